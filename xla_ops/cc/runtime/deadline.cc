#include "xla_ops/cc/runtime/deadline.h"

#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace xla_ops {
namespace {

struct Deadline {
  std::mutex mutex;
  std::condition_variable changed;
  int64_t number = 0;  // of the one that holds; every start and end is another
};

// Never destroyed: its threads may outlive the end of main.
Deadline& TheDeadline() {
  static auto* deadline = new Deadline;
  return *deadline;
}

}  // namespace

void StartDeadline(int64_t milliseconds, const std::string& text) {
  Deadline& deadline = TheDeadline();
  EndDeadline();
  std::lock_guard<std::mutex> lock(deadline.mutex);
  const int64_t number = deadline.number;
  const auto end = std::chrono::steady_clock::now() +
                   std::chrono::milliseconds(milliseconds);
  std::thread([&deadline, number, end, line = text + "\n"] {
    std::unique_lock<std::mutex> lock(deadline.mutex);
    const bool is_off = deadline.changed.wait_until(
        lock, end, [&] { return deadline.number != number; });
    if (is_off) return;
    // Nothing of the process may be waited for, its streams' locks included.
    if (write(STDERR_FILENO, line.data(), line.size()) >= 0) _exit(1);
    _exit(1);
  }).detach();
}

void EndDeadline() {
  Deadline& deadline = TheDeadline();
  {
    std::lock_guard<std::mutex> lock(deadline.mutex);
    ++deadline.number;
  }
  deadline.changed.notify_all();
}

}  // namespace xla_ops
