// ParallelFor, run by a handler as an op runs it: without a pool, with
// threads, and with a pool too busy to help.

#include "xla_ops/cc/core/parallel.h"

#include <atomic>
#include <chrono>  // NOLINT
#include <cstdint>
#include <mutex>  // NOLINT
#include <set>
#include <thread>  // NOLINT
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/call_frame.h"
#include "xla_ops/cc/core/error.h"
#include "xla_ops/cc/core/test_tensor.h"
#include "xla_ops/cc/core/testing.h"

namespace xla_ops {
namespace {

using testing::ExpectOk;
using testing::TestThreads;

constexpr int64_t kCount = 1000;

struct ParallelProbe {
  std::vector<std::atomic<int>> calls = std::vector<std::atomic<int>>(kCount);
  std::vector<std::atomic<int>> busy = std::vector<std::atomic<int>>(256);
  std::atomic<int> shared_workers{0};
  std::mutex mutex;
  std::set<std::thread::id> threads;
};

ParallelProbe* probe = nullptr;

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    ParallelHandler,
    [](ffi::ThreadPool pool, int64_t cost) {
      const int workers = NumWorkers(pool, kCount, cost);
      ParallelForWithWorker(pool, kCount, cost, [&](int worker, int64_t i) {
        if (worker < 0 || worker >= workers) ++probe->shared_workers;
        if (probe->busy[worker]++ != 0) ++probe->shared_workers;
        ++probe->calls[i];
        std::this_thread::sleep_for(std::chrono::microseconds(20));
        {
          std::lock_guard<std::mutex> lock(probe->mutex);
          probe->threads.insert(std::this_thread::get_id());
        }
        --probe->busy[worker];
      });
      return ffi::Error::Success();
    },
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<int64_t>("cost"));

// Runs the handler over `runner` and returns how many threads took part.
size_t RunParallel(TaskRunner* runner, int64_t cost) {
  ParallelProbe local;
  probe = &local;
  CallFrame frame;
  frame.AddAttr("cost", cost).SetTaskRunner(runner);
  ExpectOk(frame.Call(ParallelHandler));
  for (const auto& calls : local.calls) EXPECT_EQ(calls.load(), 1);
  EXPECT_EQ(local.shared_workers.load(), 0);
  return local.threads.size();
}

XLA_OPS_TEST(ParallelForWithoutPoolRunsHere) {
  EXPECT_EQ(RunParallel(nullptr, int64_t{1} << 40), 1u);
}

XLA_OPS_TEST(ParallelForUsesThreads) {
  TestThreads threads(8);
  EXPECT_TRUE(RunParallel(&threads, int64_t{1} << 62) > 1);
}

XLA_OPS_TEST(ParallelForKeepsSmallWorkHere) {
  TestThreads threads(8);
  EXPECT_EQ(RunParallel(&threads, 1), 1u);
}

// A busy pool: its tasks start only after the handler has returned.
class LateRunner : public TaskRunner {
 public:
  ~LateRunner() override {
    for (const auto& task : tasks_) task.first(task.second);
  }
  int64_t num_threads() const override { return 4; }
  void Schedule(XLA_FFI_Task* task, void* data) override {
    tasks_.emplace_back(task, data);
  }

 private:
  std::vector<std::pair<XLA_FFI_Task*, void*>> tasks_;
};

XLA_OPS_TEST(ParallelForNeedsNoOtherThread) {
  LateRunner late;
  EXPECT_EQ(RunParallel(&late, int64_t{1} << 40), 1u);
  probe = nullptr;  // a late task that touches it crashes
}

}  // namespace
}  // namespace xla_ops

XLA_OPS_TEST_MAIN()
