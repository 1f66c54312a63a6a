// CPU handler of xla_ops.host_collective, and the groups that it works in.
//
// A rank hands its input over in pieces, each through its slot of the shared
// memory. `posted` and `done` count pieces: a rank may fill its slot when all
// are done with the piece before, and read the others' when all have posted.

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>  // NOLINT
#include <optional>
#include <string>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/checks.h"
#include "xla_ops/cc/core/dispatch.h"
#include "xla_ops/cc/core/error.h"
#include "xla_ops/cc/core/ffi_dtype.h"
#include "xla_ops/cc/core/float.h"
#include "xla_ops/cc/core/handler.h"
#include "xla_ops/cc/core/numbered.h"
#include "xla_ops/cc/ops/host_collective/host_collective.h"

namespace xla_ops {
namespace {

constexpr char kOp[] = "host_collective";
constexpr int kSpins = 2000;          // before a waiting rank sleeps
constexpr int64_t kSleepNs = 50'000;  // each time
constexpr int64_t kLookNs =
    50'000'000;  // between looks whether the others live

static_assert(std::atomic<int64_t>::is_always_lock_free,
              "processes share these");

// What one rank tells the others; zero at first. On a line of its own.
struct alignas(64) RankState {
  std::atomic<int64_t> posted;
  std::atomic<int64_t> done;
  // Of the piece that was posted last.
  std::atomic<int64_t> call;
  std::atomic<int64_t> bytes;
};
static_assert(sizeof(RankState) == 64, "HostGroupBytes counts on it");

int64_t NowNs() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * int64_t{1'000'000'000} + now.tv_nsec;
}

struct flock RankLock(int64_t rank) {
  struct flock lock = {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = rank;
  lock.l_len = 1;
  return lock;
}

class Group {
 public:
  Group(const XlaOpsHostGroupRequest& request, void* memory)
      : fd_(static_cast<int>(request.fd)),
        rank_(request.rank),
        size_(request.size),
        slot_bytes_(request.slot_bytes),
        timeout_ns_(request.timeout_ms * 1'000'000),
        ranks_(static_cast<RankState*>(memory)),
        slots_(static_cast<char*>(memory) + HostGroupBytes(0, 0)) {}

  int64_t size() const { return size_; }

  // Calls consume(slots, offset, bytes) for each piece of `input`, once all
  // ranks have handed theirs over; slot i begins at slots + i * slot_bytes().
  template <typename Consume>
  ffi::Error Exchange(int64_t call, const char* input, int64_t bytes,
                      Consume&& consume) {
    // One call after the other, whatever threads XLA runs them on.
    std::lock_guard<std::mutex> lock(mutex_);
    for (int64_t offset = 0; offset < bytes; offset += slot_bytes_) {
      const int64_t piece = std::min(slot_bytes_, bytes - offset);
      const int64_t last = pieces_;
      XLA_OPS_RETURN_IF_ERROR(WaitForAll(
          [&](const RankState& rank) { return rank.done.load() >= last; }));
      std::memcpy(slots_ + rank_ * slot_bytes_, input + offset, piece);
      RankState& own = ranks_[rank_];
      own.call.store(call);
      own.bytes.store(bytes);
      own.posted.store(++pieces_);
      XLA_OPS_RETURN_IF_ERROR(WaitForAll(
          [&](const RankState& rank) { return rank.posted.load() > last; }));
      for (int64_t other = 0; other < size_; ++other) {
        const int64_t theirs = ranks_[other].call.load();
        const int64_t their_bytes = ranks_[other].bytes.load();
        if (theirs == call && their_bytes == bytes) continue;
        return MustError(kOp, "call",
                         "be call " + std::to_string(theirs) + " of " +
                             std::to_string(their_bytes) + " bytes, as rank " +
                             std::to_string(other) + " makes it",
                         "call " + std::to_string(call) + " of " +
                             std::to_string(bytes) + " bytes on rank " +
                             std::to_string(rank_));
      }
      consume(slots_, offset, piece);
      own.done.store(pieces_);
    }
    return ffi::Error::Success();
  }

  int64_t slot_bytes() const { return slot_bytes_; }

 private:
  template <typename IsReady>
  ffi::Error WaitForAll(IsReady&& is_ready) {
    for (int64_t rank = 0; rank < size_; ++rank) {
      if (is_ready(ranks_[rank])) continue;
      XLA_OPS_RETURN_IF_ERROR(WaitFor(rank, is_ready));
    }
    return ffi::Error::Success();
  }

  template <typename IsReady>
  ffi::Error WaitFor(int64_t rank, IsReady& is_ready) {
    for (int i = 0; i < kSpins; ++i) {
      if (is_ready(ranks_[rank])) return ffi::Error::Success();
      sched_yield();
    }
    const int64_t start = NowNs();
    int64_t look = start + kLookNs;
    while (!is_ready(ranks_[rank])) {
      const timespec sleep = {0, kSleepNs};
      nanosleep(&sleep, nullptr);
      const int64_t now = NowNs();
      if (now < look) continue;
      look = now + kLookNs;
      // It may have posted what is waited for, and ended then.
      if (!IsAlive(rank) && !is_ready(ranks_[rank])) {
        return Gone(rank, "live", "a process that has ended");
      }
      if (now - start > timeout_ns_) {
        return Gone(
            rank,
            "come within " + std::to_string(timeout_ns_ / 1'000'000) + " ms",
            "none");
      }
    }
    return ffi::Error::Success();
  }

  ffi::Error Gone(int64_t rank, const std::string& rule, const char* got) {
    return ffi::Error(XLA_FFI_Error_Code_ABORTED,
                      std::string(kOp) + ": rank " + std::to_string(rank) +
                          " must " + rule + ", got " + got);
  }

  bool IsAlive(int64_t rank) const {
    if (rank == rank_) return true;
    struct flock lock = RankLock(rank);
    // What cannot be asked does not show that it has ended.
    return fcntl(fd_, F_GETLK, &lock) != 0 || lock.l_type != F_UNLCK;
  }

  const int fd_;
  const int64_t rank_;
  const int64_t size_;
  const int64_t slot_bytes_;
  const int64_t timeout_ns_;
  RankState* const ranks_;
  char* const slots_;
  std::mutex mutex_;
  int64_t pieces_ = 0;  // guarded by mutex_
};

struct HostCollectiveParams {
  Group* group;
  int64_t call;
  bool gathers;
  DType dtype;
  const char* input;
  char* out;
  int64_t bytes;  // of input
};

auto HostCollectiveBinding() {
  return ffi::Ffi::Bind()
      .Arg<ffi::AnyBuffer>()  // input
      .Arg<ffi::AnyBuffer>()  // after
      .Ret<ffi::AnyBuffer>()  // out
      .Attr<int64_t>("group")
      .Attr<int64_t>("call")
      .Attr<bool>("gathers");
}

ffi::Error MakeHostCollectiveParams(ffi::AnyBuffer input, ffi::AnyBuffer after,
                                    ffi::Result<ffi::AnyBuffer> out,
                                    int64_t group, int64_t call, bool gathers,
                                    HostCollectiveParams* params) {
  (void)after;
  params->group = Numbered<Group>::All().Find(group);
  if (params->group == nullptr) {
    return MustError(kOp, "group", "be one that this process has joined",
                     std::to_string(group));
  }
  const std::optional<DType> dtype = ToDType(input.element_type());
  const bool can_add =
      dtype == DType::kF32 || dtype == DType::kF16 || dtype == DType::kBF16;
  if (!dtype || (!gathers && !can_add)) {
    return MustError(kOp, "input", "be float32, float16 or bfloat16",
                     DTypeName(input.element_type()));
  }
  const int64_t copies = gathers ? params->group->size() : 1;
  if (out->element_type() != input.element_type() ||
      out->size_bytes() != copies * input.size_bytes()) {
    return MustError(
        kOp, "out", "be " + std::to_string(copies) + " inputs",
        DTypeName(out->element_type()) + " " + FormatShape(out->dimensions()));
  }
  params->call = call;
  params->gathers = gathers;
  params->dtype = *dtype;
  params->input = static_cast<const char*>(input.untyped_data());
  params->out = static_cast<char*>(out->untyped_data());
  params->bytes = input.size_bytes();
  return ffi::Error::Success();
}

ffi::Error HostCollective(const HostCollectiveParams& params,
                          ffi::ThreadPool&) {
  Group& group = *params.group;
  const int64_t slot = group.slot_bytes();
  if (params.gathers) {
    return group.Exchange(
        params.call, params.input, params.bytes,
        [&](const char* slots, int64_t offset, int64_t bytes) {
          for (int64_t rank = 0; rank < group.size(); ++rank) {
            std::memcpy(params.out + rank * params.bytes + offset,
                        slots + rank * slot, bytes);
          }
        });
  }
  return DispatchFloat(params.dtype, [&](auto dtype) {
    using T = CpuType<dtype.value>;
    return group.Exchange(
        params.call, params.input, params.bytes,
        [&](const char* slots, int64_t offset, int64_t bytes) {
          T* const out = reinterpret_cast<T*>(params.out + offset);
          const int64_t count = bytes / static_cast<int64_t>(sizeof(T));
          for (int64_t i = 0; i < count; ++i) {
            float sum = 0;
            for (int64_t rank = 0; rank < group.size(); ++rank) {
              sum +=
                  ToFloat(reinterpret_cast<const T*>(slots + rank * slot)[i]);
            }
            out[i] = FromFloat<T>(sum);
          }
        });
  });
}

const char* Join(const XlaOpsHostGroupRequest& request, int64_t* group) {
  if (request.size < 1 || request.size > XLA_OPS_HOST_GROUP_MAX_RANKS) {
    return "size must be 1 to 64";
  }
  if (request.rank < 0 || request.rank >= request.size) {
    return "rank must be below size";
  }
  if (request.slot_bytes < 64 || request.slot_bytes % 64 != 0) {
    return "slot_bytes must be a multiple of 64";
  }
  if (request.timeout_ms < 1) return "timeout_ms must be positive";
  const int fd = static_cast<int>(request.fd);
  const int64_t bytes = HostGroupBytes(request.size, request.slot_bytes);
  struct stat file;
  if (fstat(fd, &file) != 0 || file.st_size < bytes) {
    return "fd must be a file of the group's size";
  }
  struct flock lock = RankLock(request.rank);
  if (fcntl(fd, F_SETLK, &lock) != 0) {
    return "rank must be free, and another process has it";
  }
  void* const memory =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (memory == MAP_FAILED) return "fd must be a file that can be mapped";
  *group = Numbered<Group>::All().Add(std::make_unique<Group>(request, memory));
  return nullptr;
}

}  // namespace

XLA_OPS_CPU_HANDLER(host_collective, HostCollectiveBinding(),
                    MakeHostCollectiveParams, HostCollective);

}  // namespace xla_ops

const char* xla_ops_host_group_join(const XlaOpsHostGroupRequest* request,
                                    XlaOpsHostGroup* group) {
  return xla_ops::Join(*request, &group->group);
}
