// The threads that direct calls lend to CPU handlers.
//
// Tested by tests/core/test_runtime.py.

#ifndef XLA_OPS_CC_RUNTIME_THREAD_POOL_H_
#define XLA_OPS_CC_RUNTIME_THREAD_POOL_H_

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <utility>

#include "xla_ops/cc/core/call_frame.h"

namespace xla_ops {

// A queue and a fixed number of threads that run its tasks in order of arrival.
// Never destroyed.
class ThreadPool : public TaskRunner {
 public:
  // Starts `num_threads` threads, or as many as the system gives.
  explicit ThreadPool(int64_t num_threads);

  int64_t num_threads() const override { return num_threads_; }
  void Schedule(XLA_FFI_Task* task, void* data) override;

 private:
  void Run();

  int64_t num_threads_ = 0;
  std::mutex mutex_;
  std::condition_variable not_empty_;
  std::deque<std::pair<XLA_FFI_Task*, void*>> tasks_;
};

// The pool of this process, as many threads as the process may use CPUs (the
// environment variable OMP_NUM_THREADS lowers it). Null where that is one:
// handlers then run in the calling thread. A child made by fork() has a new
// pool, since threads do not survive fork.
TaskRunner* SharedThreadPool();

}  // namespace xla_ops

#endif  // XLA_OPS_CC_RUNTIME_THREAD_POOL_H_
