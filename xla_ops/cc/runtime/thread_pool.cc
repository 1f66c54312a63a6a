// A fixed pool of threads; see thread_pool.h.

#include "xla_ops/cc/runtime/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <cstdlib>
#include <system_error>
#include <thread>

namespace xla_ops {
namespace {

int64_t UsableCpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  int64_t cpus = sched_getaffinity(0, sizeof(set), &set) == 0
                     ? CPU_COUNT(&set)
                     : std::thread::hardware_concurrency();
  if (const char* text = std::getenv("OMP_NUM_THREADS")) {
    const int64_t limit = std::strtoll(text, nullptr, 10);
    if (limit > 0 && limit < cpus) cpus = limit;
  }
  return cpus;
}

// The pool in use; null until it is needed. A plain lock would do, but could be
// held by another thread at the time of a fork.
std::atomic<ThreadPool*> shared_pool{nullptr};

// Leaks the parent's pool, whose threads do not exist in this process.
void ForgetPool() { shared_pool.store(nullptr); }

}  // namespace

ThreadPool::ThreadPool(int64_t num_threads) {
  try {
    for (; num_threads_ < num_threads; ++num_threads_) {
      std::thread(&ThreadPool::Run, this).detach();
    }
  } catch (const std::system_error&) {
    // The system's limit on threads is reached: make do with those there are.
  }
}

void ThreadPool::Schedule(XLA_FFI_Task* task, void* data) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    tasks_.emplace_back(task, data);
  }
  not_empty_.notify_one();
}

void ThreadPool::Run() {
  while (true) {
    std::pair<XLA_FFI_Task*, void*> task;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      not_empty_.wait(lock, [this] { return !tasks_.empty(); });
      task = tasks_.front();
      tasks_.pop_front();
    }
    task.first(task.second);
  }
}

TaskRunner* SharedThreadPool() {
  static const int64_t cpus = [] {
    pthread_atfork(nullptr, nullptr, &ForgetPool);
    return UsableCpus();
  }();
  if (cpus < 2) return nullptr;
  ThreadPool* pool = shared_pool.load();
  if (pool != nullptr) return pool;
  auto* made = new ThreadPool(cpus);
  if (made->num_threads() == 0) {
    delete made;
    return nullptr;
  }
  // Another thread may have been faster; its pool wins and this one idles.
  if (shared_pool.compare_exchange_strong(pool, made)) return made;
  return pool;
}

}  // namespace xla_ops
