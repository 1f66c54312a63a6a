// Objects of a process that a call names by a number among its attributes, such
// as the groups of ranks that collectives work in.

#ifndef XLA_OPS_CC_CORE_NUMBERED_H_
#define XLA_OPS_CC_CORE_NUMBERED_H_

#include <cstdint>
#include <memory>
#include <mutex>  // NOLINT
#include <utility>
#include <vector>

namespace xla_ops {

// Any thread may call. Objects stay for as long as the process lives.
template <typename T>
class Numbered {
 public:
  // Never destroyed: handlers may run while the process exits.
  static Numbered& All() {
    static auto* const all = new Numbered;
    return *all;
  }

  // The object's number; they count from 0.
  int64_t Add(std::unique_ptr<T> object) {
    std::lock_guard<std::mutex> lock(mutex_);
    objects_.push_back(std::move(object));
    return static_cast<int64_t>(objects_.size()) - 1;
  }

  // Null where there is none of that number.
  T* Find(int64_t number) const {
    std::lock_guard<std::mutex> lock(mutex_);
    const bool is_known =
        0 <= number && number < static_cast<int64_t>(objects_.size());
    return is_known ? objects_[number].get() : nullptr;
  }

 private:
  Numbered() = default;

  mutable std::mutex mutex_;
  std::vector<std::unique_ptr<T>> objects_;  // guarded by mutex_
};

}  // namespace xla_ops

#endif  // XLA_OPS_CC_CORE_NUMBERED_H_
