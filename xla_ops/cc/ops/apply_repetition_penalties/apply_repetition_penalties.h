// Makes the logits of tokens that a sequence already has less likely, in place.
//
// Where prompt_mask[s, v] or output_mask[s, v] is true, with p =
// repetition_penalties[s]:
//   logits[s, v] = T(x / p)  where x = logits[s, v] > 0, else T(x * p)
// computed in fp32 and rounded once to the tensor's type T, as in vLLM. NaN
// stays NaN. Other logits stay.
//
// Target `xla_ops.apply_repetition_penalties`:
//   args     logits               [num_seqs, vocab_size] fp32, fp16 or bf16
//            prompt_mask          the same shape, bool
//            output_mask          the same shape, bool
//            repetition_penalties [num_seqs], logits' dtype
//   results  logits               aliased to the argument
// Where the result is not aliased (no caller of ours) it is copied first.
//
// Tested by apply_repetition_penalties_test.cc and
// tests/ops/test_apply_repetition_penalties.py.

#ifndef XLA_OPS_CC_OPS_APPLY_REPETITION_PENALTIES_APPLY_REPETITION_PENALTIES_H_
#define XLA_OPS_CC_OPS_APPLY_REPETITION_PENALTIES_APPLY_REPETITION_PENALTIES_H_

#include <cstdint>

#include "xla_ops/cc/core/dtype.h"

namespace xla_ops {

struct ApplyRepetitionPenaltiesParams {
  DType dtype;
  int64_t num_seqs;
  int64_t vocab_size;
  const void* logits;          // [num_seqs, vocab_size]
  const uint8_t* prompt_mask;  // the same, 0 or 1
  const uint8_t* output_mask;  // the same
  const void* penalties;       // [num_seqs]
  void* out;                   // [num_seqs, vocab_size]; usually `logits`
};

}  // namespace xla_ops

#endif  // XLA_OPS_CC_OPS_APPLY_REPETITION_PENALTIES_APPLY_REPETITION_PENALTIES_H_
