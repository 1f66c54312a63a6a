#include "xla_ops/cc/runtime/deadline.h"

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <thread>

namespace xla_ops {
namespace {

// How often its thread looks. A condition variable that waits by the monotonic
// clock would ask for a newer glibc than the wheel's.
constexpr std::chrono::milliseconds kStep(20);

// Of the deadline that holds; every start and end is another.
std::atomic<int64_t> number{0};

}  // namespace

void StartDeadline(int64_t milliseconds, const std::string& text) {
  const int64_t mine = ++number;
  const auto end = std::chrono::steady_clock::now() +
                   std::chrono::milliseconds(milliseconds);
  std::thread([mine, end, line = text + "\n"] {
    while (number == mine) {
      if (std::chrono::steady_clock::now() >= end) {
        // Nothing of the process may be waited for, its streams' locks
        // included.
        [[maybe_unused]] const ssize_t written =
            write(STDERR_FILENO, line.data(), line.size());
        _exit(1);
      }
      std::this_thread::sleep_for(kStep);
    }
  }).detach();
}

void EndDeadline() { ++number; }

}  // namespace xla_ops
