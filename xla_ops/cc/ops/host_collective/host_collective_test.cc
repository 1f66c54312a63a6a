// xla_ops.host_collective between processes made by fork(): sums and gathers
// of every type and of many pieces, another order of calls, a rank that ends
// and one that does not come.

#include "xla_ops/cc/ops/host_collective/host_collective.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "xla_ops/cc/core/call_frame.h"
#include "xla_ops/cc/core/test_tensor.h"
#include "xla_ops/cc/core/testing.h"

extern "C" XLA_FFI_Error* xla_ops_host_collective_cpu(XLA_FFI_CallFrame* frame);

namespace xla_ops {
namespace {

using testing::AddArgs;
using testing::AddResults;
using testing::ExpectInvalid;
using testing::TestTensor;

constexpr int64_t kSlot = 128;

// A file that has no name: each rank opens it anew, for a lock of its own.
class SharedFile {
 public:
  explicit SharedFile(int64_t size) {
    char path[] = "/tmp/host_collective_XXXXXX";
    const int fd = mkstemp(path);
    path_ = path;
    EXPECT_EQ(ftruncate(fd, HostGroupBytes(size, kSlot)), 0);
    close(fd);
  }
  ~SharedFile() { unlink(path_.c_str()); }
  int Open() const { return open(path_.c_str(), O_RDWR); }

 private:
  std::string path_;
};

int64_t Join(const SharedFile& file, int64_t rank, int64_t size,
             int64_t timeout_ms = 20'000) {
  const XlaOpsHostGroupRequest request = {
      sizeof(request), file.Open(), rank, size, kSlot, timeout_ms};
  XlaOpsHostGroup group = {sizeof(group), -1};
  const char* wrong = xla_ops_host_group_join(&request, &group);
  EXPECT_EQ(std::string(wrong == nullptr ? "" : wrong), "");
  return group.group;
}

CallStatus Run(int64_t group, int64_t call, bool gathers,
               const TestTensor& input, TestTensor* out) {
  const TestTensor after(DType::kF32, {0}, {});
  CallFrame frame;
  AddArgs(&frame, {&input, &after});
  AddResults(&frame, {out});
  frame.AddAttr("group", group).AddAttr("call", call);
  frame.AddAttr("gathers", gathers);
  return frame.Call(xla_ops_host_collective_cpu);
}

// Runs `body` as each rank but 0 in processes of their own, and as rank 0
// here; the others must return true.
void OnRanks(int64_t size, const std::function<bool(int64_t)>& body) {
  std::vector<pid_t> others;
  for (int64_t rank = 1; rank < size; ++rank) {
    const pid_t pid = fork();
    if (pid == 0) _exit(body(rank) ? 0 : 1);
    others.push_back(pid);
  }
  EXPECT_EQ(body(0), true);
  for (const pid_t pid : others) {
    int status = -1;
    waitpid(pid, &status, 0);
    EXPECT_EQ(status, 0);
  }
}

std::vector<double> Values(int64_t rank, int64_t count) {
  std::vector<double> values(count);
  for (int64_t i = 0; i < count; ++i) values[i] = (i % 7) + 8 * rank;
  return values;
}

void TestValues(DType dtype, int64_t size, int64_t count) {
  const SharedFile file(size);
  OnRanks(size, [&](int64_t rank) {
    const int64_t group = Join(file, rank, size);
    const TestTensor input(dtype, {count}, Values(rank, count));
    bool ok = true;
    for (int64_t call = 0; call < 3; ++call) {
      TestTensor sum(dtype, {count});
      TestTensor all(dtype, {size, count});
      ok = ok && Run(group, 2 * call, false, input, &sum).ok();
      ok = ok && Run(group, 2 * call + 1, true, input, &all).ok();
      for (int64_t i = 0; i < count; ++i) {
        double expected = 0;
        for (int64_t other = 0; other < size; ++other) {
          const double value = (i % 7) + 8 * other;
          expected += value;
          ok = ok && all.Get(other * count + i) == value;
        }
        ok = ok && sum.Get(i) == expected;
      }
    }
    return ok;
  });
}

XLA_OPS_TEST(AllValues) {
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    // Nothing, part of a slot, a slot, several and a part.
    for (const int64_t count : {0, 1, 32, 64, 1000}) {
      TestValues(dtype, 2, count);
    }
    TestValues(dtype, 3, 100);
    TestValues(dtype, 1, 100);
  }
}

XLA_OPS_TEST(AnotherOrder) {
  const SharedFile file(2);
  OnRanks(2, [&](int64_t rank) {
    const int64_t group = Join(file, rank, 2);
    const TestTensor input(DType::kF32, {4}, {1, 2, 3, 4});
    TestTensor out(DType::kF32, {4});
    const CallStatus status = Run(group, rank, false, input, &out);
    const std::string us = std::to_string(rank);
    const std::string other = std::to_string(1 - rank);
    return status.message == "host_collective: call must be call " + other +
                                 " of 16 bytes, as rank " + other +
                                 " makes it, got call " + us +
                                 " of 16 bytes on rank " + us;
  });
}

XLA_OPS_TEST(ARankThatEnds) {
  const SharedFile file(2);
  int ready[2];
  EXPECT_EQ(pipe(ready), 0);
  const pid_t pid = fork();
  if (pid == 0) {
    Join(file, 1, 2);
    (void)!write(ready[1], "x", 1);
    for (;;) pause();
  }
  const int64_t group = Join(file, 0, 2);
  char byte;
  EXPECT_EQ(read(ready[0], &byte, 1), 1);
  kill(pid, SIGKILL);  // it is not waited for: a zombie has ended, too
  const TestTensor input(DType::kF32, {4}, {1, 2, 3, 4});
  TestTensor out(DType::kF32, {4});
  const CallStatus status = Run(group, 0, false, input, &out);
  EXPECT_EQ(status.message,
            std::string("host_collective: rank 1 must live, got a process that "
                        "has ended"));
  waitpid(pid, nullptr, 0);
}

XLA_OPS_TEST(ARankThatDoesNotCome) {
  const SharedFile file(2);
  int ready[2];
  EXPECT_EQ(pipe(ready), 0);
  const pid_t pid = fork();
  if (pid == 0) {
    Join(file, 1, 2);
    (void)!write(ready[1], "x", 1);
    for (;;) pause();
  }
  const int64_t group = Join(file, 0, 2, /*timeout_ms=*/200);
  char byte;
  EXPECT_EQ(read(ready[0], &byte, 1), 1);
  const TestTensor input(DType::kF32, {4}, {1, 2, 3, 4});
  TestTensor out(DType::kF32, {4});
  const CallStatus status = Run(group, 0, false, input, &out);
  EXPECT_EQ(
      status.message,
      std::string("host_collective: rank 1 must come within 200 ms, got none"));
  kill(pid, SIGKILL);
  waitpid(pid, nullptr, 0);
}

XLA_OPS_TEST(Errors) {
  const SharedFile file(1);
  const int64_t group = Join(file, 0, 1);
  const TestTensor input(DType::kF32, {4}, {1, 2, 3, 4});
  const TestTensor integers(DType::kS32, {4}, {1, 2, 3, 4});
  TestTensor out(DType::kF32, {4});
  TestTensor small(DType::kF32, {3});
  TestTensor sum(DType::kS32, {4});
  ExpectInvalid(Run(99, 0, false, input, &out),
                "host_collective: group must be one that this process has "
                "joined, got 99");
  ExpectInvalid(Run(group, 0, false, integers, &sum),
                "host_collective: input must be float32, float16 or bfloat16, "
                "got int32");
  ExpectInvalid(Run(group, 0, true, input, &small),
                "host_collective: out must be 1 inputs, got float32 [3]");
}

std::string Refused(XlaOpsHostGroupRequest request) {
  XlaOpsHostGroup group = {sizeof(group), -1};
  const char* wrong = xla_ops_host_group_join(&request, &group);
  return wrong == nullptr ? "" : wrong;
}

XLA_OPS_TEST(RefusedGroups) {
  const SharedFile file(2);
  const int fd = file.Open();
  const int64_t size = sizeof(XlaOpsHostGroupRequest);
  EXPECT_EQ(Refused({size, fd, 0, 65, kSlot, 1}),
            std::string("size must be 1 to 64"));
  EXPECT_EQ(Refused({size, fd, 2, 2, kSlot, 1}),
            std::string("rank must be below size"));
  EXPECT_EQ(Refused({size, fd, 0, 2, 63, 1}),
            std::string("slot_bytes must be a multiple of 64"));
  EXPECT_EQ(Refused({size, fd, 0, 2, kSlot, 0}),
            std::string("timeout_ms must be positive"));
  EXPECT_EQ(Refused({size, fd, 0, 2, 64 * kSlot, 1}),
            std::string("fd must be a file of the group's size"));
  EXPECT_EQ(Refused({size, -1, 0, 2, kSlot, 1}),
            std::string("fd must be a file of the group's size"));
  close(fd);
}

}  // namespace
}  // namespace xla_ops

XLA_OPS_TEST_MAIN()
