// Spreads independent pieces of work over the thread pool that XLA lends to
// CPU handlers; in the calling thread alone where there is none.
//
//   ParallelFor(pool, rows, /*cost=*/hidden_size, [&](int64_t row) {...});
//
// The caller works too, and waits only for pieces that another thread has
// begun: a handler runs on a thread of the same pool, so waiting for tasks
// that may never start would deadlock. Bodies must not throw.
//
// Tested by parallel_test.cc.

#ifndef XLA_OPS_CC_CORE_PARALLEL_H_
#define XLA_OPS_CC_CORE_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>  // NOLINT
#include <cstdint>
#include <memory>
#include <mutex>  // NOLINT
#include <type_traits>

#include "xla/ffi/api/ffi.h"

namespace xla_ops {
namespace internal {

// Outlives ParallelFor: a task may start after it has returned, and then
// finds no piece left and touches nothing else.
struct ParallelWork {
  std::atomic<int64_t> next_piece{0};
  std::atomic<int> next_worker{0};
  std::mutex mutex;
  std::condition_variable all_done;
  int64_t pieces_done = 0;  // guarded by mutex
};

}  // namespace internal

// Work worth a task of its own, in inner-loop steps (about 10 microseconds;
// a task costs about 1).
inline constexpr int64_t kMinTaskCost = 32768;

// How many threads ParallelFor will use at most, the caller included.
inline int NumWorkers(const xla::ffi::ThreadPool& pool, int64_t count,
                      int64_t cost) {
  const int64_t per_piece = std::max<int64_t>(cost, 1);
  const int64_t wanted = count > INT64_MAX / per_piece
                             ? INT64_MAX
                             : count * per_piece / kMinTaskCost;
  const int64_t threads = std::min({pool.num_threads(), count, wanted});
  return static_cast<int>(std::clamp<int64_t>(threads, 1, 256));
}

// Calls body(worker, index) for each index in [0, count), where no two
// concurrent calls have the same worker in [0, NumWorkers(...)): for bodies
// with scratch memory. `cost`: inner-loop steps of one index.
template <typename Body>
void ParallelForWithWorker(xla::ffi::ThreadPool& pool, int64_t count,
                           int64_t cost, const Body& body) {
  const int workers = NumWorkers(pool, count, cost);
  if (workers == 1) {
    for (int64_t i = 0; i < count; ++i) body(0, i);
    return;
  }
  // Several pieces a worker, for balance; each of neighbouring indices.
  const int64_t piece = std::max<int64_t>(1, count / (workers * int64_t{4}));
  const int64_t pieces = (count + piece - 1) / piece;
  auto work = std::make_shared<internal::ParallelWork>();
  const auto run = [work, piece, pieces, count, &body] {
    int64_t done = 0;
    int worker = -1;
    for (;;) {
      const int64_t p = work->next_piece.fetch_add(1);
      if (p >= pieces) break;
      if (worker < 0) worker = work->next_worker.fetch_add(1);
      const int64_t end = std::min(count, (p + 1) * piece);
      for (int64_t i = p * piece; i < end; ++i) body(worker, i);
      ++done;
    }
    if (done == 0) return;
    std::lock_guard<std::mutex> lock(work->mutex);
    work->pieces_done += done;
    if (work->pieces_done == pieces) work->all_done.notify_all();
  };
  for (int i = 1; i < workers; ++i)
    pool.Schedule(std::decay_t<decltype(run)>(run));
  run();
  std::unique_lock<std::mutex> lock(work->mutex);
  work->all_done.wait(lock, [&] { return work->pieces_done == pieces; });
}

// The same for bodies without scratch memory: body(index).
template <typename Body>
void ParallelFor(xla::ffi::ThreadPool& pool, int64_t count, int64_t cost,
                 const Body& body) {
  ParallelForWithWorker(pool, count, cost,
                        [&body](int, int64_t i) { body(i); });
}

}  // namespace xla_ops

#endif  // XLA_OPS_CC_CORE_PARALLEL_H_
