// Launches of users' kernels; see launch.h.

#include "xla_ops/cc/launch/launch.h"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <string>
#include <vector>

#include "xla_ops/cc/core/error.h"

namespace xla_ops {
namespace {

// Kernels of CUDA take 4 KiB of parameters, or 32 from 7.0 on: as many pointers
// as anybody will write.
constexpr int kMaxParameters = 256;

constexpr int64_t kMaxGrid[3] = {INT32_MAX, 65535, 65535};
constexpr int64_t kMaxBlock[3] = {1024, 1024, 64};
constexpr int64_t kMaxThreads = 1024;

ffi::Error Failure(const LaunchAttributes& call, const std::string& text) {
  return ffi::Error::Internal(std::string(call.op) + ": kernel " +
                              std::string(call.kernel) + ": " + text);
}

// Takes the first word of `text` off it; "" at its end.
std::string_view TakeWord(std::string_view* text) {
  const size_t end = std::min(text->find(' '), text->size());
  const std::string_view word = text->substr(0, end);
  text->remove_prefix(std::min(end + 1, text->size()));
  return word;
}

bool ReadNumber(std::string_view word, int64_t* number) {
  const char* end = word.data() + word.size();
  const auto [rest, error] = std::from_chars(word.data(), end, *number);
  return error == std::errc() && rest == end;
}

ffi::Error ReadSizes(const LaunchAttributes& call, const char* argument,
                     std::string_view text, const int64_t (&most)[3],
                     unsigned (&sizes)[3]) {
  std::string_view rest = text;
  for (int i = 0; i < 3; ++i) {
    int64_t size = 0;
    if (!ReadNumber(TakeWord(&rest), &size) || size < 1 || size > most[i]) {
      const std::string rule =
          "be 3 sizes from 1 to [" + std::to_string(most[0]) + ", " +
          std::to_string(most[1]) + ", " + std::to_string(most[2]) + "]";
      return MustError(call.op, argument, rule, "[" + std::string(text) + "]");
    }
    sizes[i] = static_cast<unsigned>(size);
  }
  if (rest.empty()) return ffi::Error::Success();
  return MustError(call.op, argument, "be 3 sizes",
                   "[" + std::string(text) + "]");
}

int Digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  return -1;
}

// What the kernel is given. Not copied: `pointers` points into it.
struct Parameters {
  int count = 0;
  uint64_t values[kMaxParameters];
  size_t sizes[kMaxParameters];
  void* pointers[kMaxParameters];
};

// The bytes of a value, as hexadecimal digits; false if they are none.
bool ReadValue(std::string_view digits, uint64_t* value, size_t* size) {
  *size = digits.size() / 2;
  if (digits.size() % 2 != 0 || *size == 0 || *size > 8 ||
      (*size & (*size - 1)) != 0) {
    return false;
  }
  unsigned char bytes[8] = {};
  for (size_t i = 0; i < *size; ++i) {
    const int high = Digit(digits[2 * i]);
    const int low = Digit(digits[2 * i + 1]);
    if (high < 0 || low < 0) return false;
    bytes[i] = static_cast<unsigned char>(high * 16 + low);
  }
  std::memcpy(value, bytes, sizeof(bytes));
  return true;
}

// A result that is computed elsewhere, with bytes around it that tell whether
// the kernel wrote there.
struct Guarded {
  int64_t result;
  uint64_t address;  // of the result
  uint64_t start;    // of the scratch
  size_t size;       // of the result, in bytes
};

constexpr unsigned char kGuard = 0xA5;

ffi::Error ReadGuarded(const LaunchAttributes& call, ffi::RemainingRets results,
                       std::vector<Guarded>* guarded) {
  std::string_view rest = call.guarded;
  while (!rest.empty()) {
    const std::string_view word = TakeWord(&rest);
    const size_t colon = std::min(word.find(':'), word.size());
    const std::string_view behind =
        word.substr(std::min(colon + 1, word.size()));
    const int64_t count = static_cast<int64_t>(results.size());
    int64_t result = -1;
    int64_t scratch = -1;
    bool fits = ReadNumber(word.substr(0, colon), &result) &&
                ReadNumber(behind, &scratch) && result >= 0 && result < count &&
                scratch >= 0 && scratch < count;
    if (fits) {
      const ffi::AnyBuffer to = **results.get<ffi::AnyBuffer>(result);
      const ffi::AnyBuffer in = **results.get<ffi::AnyBuffer>(scratch);
      fits = in.size_bytes() == to.size_bytes() + 2 * kGuardBytes;
      guarded->push_back({result, reinterpret_cast<uint64_t>(to.untyped_data()),
                          reinterpret_cast<uint64_t>(in.untyped_data()),
                          to.size_bytes()});
    }
    if (!fits) {
      return MustError(call.op, "guarded",
                       "name a result and a scratch that is larger by two "
                       "guards",
                       word);
    }
  }
  return ffi::Error::Success();
}

CuResult FillGuards(const CuDriver& driver, void* stream,
                    const std::vector<Guarded>& guarded) {
  for (const Guarded& one : guarded) {
    const CuResult result =
        driver.fill(one.start, kGuard, one.size + 2 * kGuardBytes, stream);
    if (result != 0) return result;
  }
  return 0;
}

// How many of the guard's bytes at `address` are no longer as they were, and
// which is the first.
CuResult CountChanged(const CuDriver& driver, uint64_t address, int64_t* count,
                      int64_t* first) {
  unsigned char bytes[kGuardBytes];
  const CuResult result = driver.copy_to_host(bytes, address, kGuardBytes);
  *count = 0;
  for (int64_t i = kGuardBytes - 1; i >= 0 && result == 0; --i) {
    if (bytes[i] == kGuard) continue;
    ++*count;
    *first = i;
  }
  return result;
}

// Waits for the kernel, as only debug mode may, unless the call is being
// captured.
ffi::Error CheckGuards(const CuDriver& driver, const LaunchAttributes& call,
                       void* stream, const std::vector<Guarded>& guarded) {
  int status = 0;
  CuResult result = 0;
  for (const Guarded& one : guarded) {
    if (result != 0) break;
    result =
        driver.copy(one.address, one.start + kGuardBytes, one.size, stream);
  }
  if (result == 0) result = driver.is_capturing(stream, &status);
  if (result == 0 && status != 0) return ffi::Error::Success();
  if (result == 0) result = driver.synchronize(stream);
  for (const Guarded& one : guarded) {
    for (const bool behind : {false, true}) {
      const uint64_t offset = behind ? kGuardBytes + one.size : 0;
      int64_t count = 0;
      int64_t first = 0;
      if (result == 0) {
        result = CountChanged(driver, one.start + offset, &count, &first);
      }
      if (result != 0) {
        return Failure(call, "CUDA failed: " + CuErrorText(driver, result));
      }
      if (count == 0) continue;
      const int64_t distance = behind ? first : first - kGuardBytes;
      return MustError(call.op, "kernel",
                       "write inside result " + std::to_string(one.result),
                       std::to_string(count) + " bytes changed " +
                           (behind ? "behind its end" : "before its start") +
                           ", the first at " + std::to_string(distance));
    }
  }
  return ffi::Error::Success();
}

ffi::Error ReadBuffer(const LaunchAttributes& call, std::string_view word,
                      ffi::RemainingArgs operands, ffi::RemainingRets results,
                      const std::vector<Guarded>& guarded, uint64_t* address) {
  int64_t index = -1;
  const bool is_number = ReadNumber(word.substr(1), &index) && index >= 0;
  void* data = nullptr;
  if (is_number && word[0] == 'a' &&
      index < static_cast<int64_t>(operands.size())) {
    data = operands.get<ffi::AnyBuffer>(index)->untyped_data();
  } else if (is_number && word[0] == 'r' &&
             index < static_cast<int64_t>(results.size())) {
    data = (*results.get<ffi::AnyBuffer>(index))->untyped_data();
  } else {
    const std::string rule = "name one of " + std::to_string(operands.size()) +
                             " operands and " + std::to_string(results.size()) +
                             " results, or a value";
    return MustError(call.op, "parameters", rule, word);
  }
  *address = reinterpret_cast<uint64_t>(data);
  for (const Guarded& one : guarded) {
    if (word[0] == 'r' && index == one.result) {
      *address = one.start + kGuardBytes;
    }
  }
  if (call.alignment > 1 &&
      *address % static_cast<uint64_t>(call.alignment) != 0) {
    return MustError(
        call.op,
        (word[0] == 'a' ? "operand " : "result ") + std::to_string(index),
        "be aligned to " + std::to_string(call.alignment) + " bytes",
        "an address that is " + std::to_string(*address % call.alignment) +
            " off");
  }
  return ffi::Error::Success();
}

ffi::Error ReadParameters(const LaunchAttributes& call,
                          ffi::RemainingArgs operands,
                          ffi::RemainingRets results,
                          const std::vector<Guarded>& guarded,
                          Parameters* parameters) {
  std::string_view rest = call.parameters;
  while (!rest.empty()) {
    const int i = parameters->count;
    if (i == kMaxParameters) {
      return MustError(call.op, "parameters",
                       "be at most " + std::to_string(kMaxParameters), "more");
    }
    const std::string_view word = TakeWord(&rest);
    uint64_t* value = &parameters->values[i];
    size_t* size = &parameters->sizes[i];
    *size = sizeof(void*);
    if (word == "null") {
      *value = 0;
    } else if (word.empty() || word[0] != 'v' ||
               !ReadValue(word.substr(1), value, size)) {
      if (word.empty()) {
        return MustError(call.op, "parameters", "have one space between words",
                         "'" + std::string(call.parameters) + "'");
      }
      XLA_OPS_RETURN_IF_ERROR(
          ReadBuffer(call, word, operands, results, guarded, value));
    }
    parameters->pointers[i] = value;
    ++parameters->count;
  }
  return ffi::Error::Success();
}

std::string FormatSizes(const std::vector<size_t>& sizes) {
  std::string text = "[";
  for (const size_t size : sizes) {
    if (text.size() > 1) text += ", ";
    text += std::to_string(size);
  }
  return text + "]";
}

// The driver would read past what it is given.
ffi::Error CheckParameters(const LaunchAttributes& call,
                           const LoadedKernel& kernel,
                           const Parameters& parameters) {
  if (!kernel.knows_parameters()) return ffi::Error::Success();
  const std::vector<size_t>& wanted = kernel.parameter_sizes();
  const size_t* given = parameters.sizes;
  const size_t count = static_cast<size_t>(parameters.count);
  bool fits = count == wanted.size();
  for (size_t i = 0; fits && i < count; ++i) fits = given[i] == wanted[i];
  if (fits) return ffi::Error::Success();
  return MustError(call.op, "parameters",
                   "have the kernel's sizes " + FormatSizes(wanted),
                   FormatSizes({given, given + count}));
}

ffi::Error FindKernel(const CuDriver& driver, CodeTable& table,
                      const LaunchAttributes& call, LoadedKernel** kernel,
                      KernelLimits* limits) {
  std::string error =
      table.Find(driver, call.code, call.code_bytes, call.kernel, kernel);
  if (error.empty()) error = (*kernel)->Prepare(driver, limits);
  return error.empty() ? ffi::Error::Success() : Failure(call, error);
}

}  // namespace

ffi::Error PrepareKernel(const CuDriver& driver, CodeTable& table,
                         const LaunchAttributes& call) {
  CuDevice device = 0;
  if (driver.current_device(&device) == kCuInvalidContext) {
    return ffi::Error::Success();  // no device yet: the launch will load it
  }
  LoadedKernel* kernel = nullptr;
  KernelLimits limits;
  return FindKernel(driver, table, call, &kernel, &limits);
}

ffi::Error LaunchUserKernel(const CuDriver& driver, CodeTable& table,
                            const LaunchAttributes& call, void* stream,
                            ffi::RemainingArgs operands,
                            ffi::RemainingRets results) {
  CuLaunchConfig config = {};
  unsigned cluster[3];
  XLA_OPS_RETURN_IF_ERROR(
      ReadSizes(call, "grid", call.grid, kMaxGrid, config.grid));
  XLA_OPS_RETURN_IF_ERROR(
      ReadSizes(call, "block", call.block, kMaxBlock, config.block));
  XLA_OPS_RETURN_IF_ERROR(
      ReadSizes(call, "cluster", call.cluster, kMaxBlock, cluster));
  LoadedKernel* kernel = nullptr;
  KernelLimits limits;
  XLA_OPS_RETURN_IF_ERROR(FindKernel(driver, table, call, &kernel, &limits));
  const int64_t threads =
      int64_t{config.block[0]} * config.block[1] * config.block[2];
  const int64_t most =
      limits.max_threads < kMaxThreads ? limits.max_threads : kMaxThreads;
  if (threads > most) {
    return MustError(
        call.op, "block",
        "have at most " + std::to_string(most) + " threads of this kernel",
        std::to_string(threads));
  }
  if (call.shared_bytes < 0 || call.shared_bytes > limits.max_shared_bytes) {
    return MustError(call.op, "shared_bytes",
                     "be from 0 to " + std::to_string(limits.max_shared_bytes) +
                         " on this device",
                     std::to_string(call.shared_bytes));
  }
  // Filled as far as `count` says; it is large.
  Parameters parameters;
  std::vector<Guarded> guarded;
  XLA_OPS_RETURN_IF_ERROR(ReadGuarded(call, results, &guarded));
  XLA_OPS_RETURN_IF_ERROR(
      ReadParameters(call, operands, results, guarded, &parameters));
  XLA_OPS_RETURN_IF_ERROR(CheckParameters(call, *kernel, parameters));
  config.shared_bytes = static_cast<unsigned>(call.shared_bytes);
  config.stream = stream;
  CuLaunchAttribute attribute = {};
  if (cluster[0] * cluster[1] * cluster[2] > 1) {
    attribute.id = kCuLaunchAttributeClusterDimension;
    std::memcpy(attribute.value, cluster, sizeof(cluster));
    config.attributes = &attribute;
    config.num_attributes = 1;
  }
  CuResult result = FillGuards(driver, stream, guarded);
  if (result == 0) {
    result =
        driver.launch(&config, kernel->handle(), parameters.pointers, nullptr);
  }
  if (result != 0) {
    return Failure(call, "CUDA launch failed: " + CuErrorText(driver, result));
  }
  if (guarded.empty()) return ffi::Error::Success();
  return CheckGuards(driver, call, stream, guarded);
}

}  // namespace xla_ops
