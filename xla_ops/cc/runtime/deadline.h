// Ends the process where something takes too long that nobody else can stop:
// torch_xla waits for the other processes of a job with the GIL held, so that
// neither a thread of Python nor Ctrl-C gets its turn.
//
// Tested by tests/core/test_runtime.py.

#ifndef XLA_OPS_CC_RUNTIME_DEADLINE_H_
#define XLA_OPS_CC_RUNTIME_DEADLINE_H_

#include <cstdint>
#include <string>

namespace xla_ops {

// Ends the process with status 1 after `milliseconds`, and `text` on stderr,
// unless EndDeadline comes before. One at a time: another takes its place.
void StartDeadline(int64_t milliseconds, const std::string& text);

// Calls off what StartDeadline began, if it did.
void EndDeadline();

}  // namespace xla_ops

#endif  // XLA_OPS_CC_RUNTIME_DEADLINE_H_
