// Runs any operator of torch on XLA's buffers: the handlers behind
// xla_ops.extend.torch_op.
//
// Targets `xla_ops.torch_op` and, for calls that XLA may capture into a CUDA
// graph, `xla_ops.torch_op_captured`:
//   args, results  any
//   attrs          call  str, which xla_ops/py/extend/torch_op.py writes:
//
//     aten::add Tensor|0|t0 t1 i1
//
// The operator and its overload ("-" for none); for each tensor that it
// returns the result that takes it, or "-"; and one item for each argument of
// its schema:
//
//     t2     the second operand as a tensor   n      None
//     a2,0   the same, which is result 0 too  i7     int
//     r1     a result, for out= arguments     f0x1p+0  float
//     D      the device                       b1     bool
//     d11    dtype, by XLA's number           s6162  str, in hex
//     l0     layout, m0 memory format, by torch's number
//     T2 O2 I2 F2 B2 S2  a list of tensors, optional tensors, ints, floats,
//                        bools, strs; its items follow
//
// Buffers are wrapped, never copied. What the operator returns in memory of
// its own is copied into the result, on the same stream. While it runs, XLA's
// stream and device are torch's current ones, autograd is off, and so are the
// modes of the thread that XLA happens to run it on.
//
// Built with the headers of the torch that the wheel requires. It needs
// nothing of CUDA, and finds torch's libraries in the process.
//
// Tested by tests/extend/test_torch_op.py and tests/gpu/check_extend.py.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/ffi_dtype.h"
#include "xla_ops/cc/core/handler.h"

namespace xla_ops {
namespace {

namespace ffi = ::xla::ffi;

at::ScalarType ToScalarType(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::PRED:
      return at::kBool;
    case ffi::DataType::S8:
      return at::kChar;
    case ffi::DataType::S16:
      return at::kShort;
    case ffi::DataType::S32:
      return at::kInt;
    case ffi::DataType::S64:
      return at::kLong;
    case ffi::DataType::U8:
      return at::kByte;
    case ffi::DataType::F16:
      return at::kHalf;
    case ffi::DataType::F32:
      return at::kFloat;
    case ffi::DataType::F64:
      return at::kDouble;
    case ffi::DataType::BF16:
      return at::kBFloat16;
    case ffi::DataType::F8E5M2:
      return at::kFloat8_e5m2;
    case ffi::DataType::F8E4M3FN:
      return at::kFloat8_e4m3fn;
    default:
      throw std::invalid_argument("no dtype of torch is " + DTypeName(dtype));
  }
}

// One item of the text.
struct Item {
  char kind = 'n';
  int64_t number = 0;   // operand or result, length of a list, int, ...
  int64_t result = -1;  // "a": which result the operand is
  double real = 0;
  std::string text;
};

// A text as it is run.
struct Call {
  std::string name;  // "aten::add.Tensor", for error texts
  c10::OperatorHandle op;
  std::vector<int64_t> results;  // of each tensor returned; -1: not wanted
  std::vector<Item> items;
};

std::vector<std::string> Split(std::string_view text, char separator) {
  std::vector<std::string> parts(1);
  for (const char c : text) {
    if (c == separator) {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  if (parts.back().empty()) parts.pop_back();
  return parts;
}

Item ParseItem(const std::string& token) {
  Item item;
  item.kind = token.at(0);
  const std::string value = token.substr(1);
  switch (item.kind) {
    case 'n':
    case 'D':
      break;
    case 'f':
      item.real = std::strtod(value.c_str(), nullptr);
      break;
    case 's':
      for (size_t i = 0; i + 1 < value.size(); i += 2) {
        const std::string byte = value.substr(i, 2);
        item.text += static_cast<char>(std::strtol(byte.c_str(), nullptr, 16));
      }
      break;
    case 'a':
      item.result = std::stoll(value.substr(value.find(',') + 1));
      item.number = std::stoll(value);
      break;
    default:
      item.number = std::stoll(value);
  }
  return item;
}

std::shared_ptr<const Call> Parse(std::string_view text) {
  const std::vector<std::string> parts = Split(text, '|');
  const std::vector<std::string> names = Split(parts.at(0), ' ');
  const std::string overload = names.at(1) == "-" ? "" : names.at(1);
  Call call{names.at(0) + (overload.empty() ? "" : "." + overload),
            c10::Dispatcher::singleton().findSchemaOrThrow(names.at(0).c_str(),
                                                           overload.c_str()),
            {},
            {}};
  for (const std::string& token : Split(parts.at(1), ' ')) {
    call.results.push_back(token == "-" ? -1 : std::stoll(token));
  }
  if (parts.size() > 2) {
    for (const std::string& token : Split(parts[2], ' ')) {
      call.items.push_back(ParseItem(token));
    }
  }
  return std::make_shared<const Call>(std::move(call));
}

// The calls of the process. As many as programs hold; XLA keeps those, too.
std::shared_ptr<const Call> Find(std::string_view text) {
  struct Calls {
    std::mutex mutex;
    std::unordered_map<std::string, std::shared_ptr<const Call>> by_text;
  };
  static Calls* const calls = new Calls;
  std::string key(text);
  std::lock_guard<std::mutex> lock(calls->mutex);
  std::shared_ptr<const Call>& call = calls->by_text[key];
  if (call == nullptr) call = Parse(text);
  return call;
}

// The buffers of one call as tensors.
class Frame {
 public:
  Frame(ffi::RemainingArgs args, ffi::RemainingRets rets, c10::Device device)
      : args_(args), rets_(rets), device_(device) {}

  c10::Device device() const { return device_; }

  at::Tensor Operand(int64_t i) const {
    return Wrap(args_.get<ffi::AnyBuffer>(i).value());
  }
  at::Tensor Result(int64_t i) const {
    return Wrap(*rets_.get<ffi::AnyBuffer>(i).value());
  }
  // An operand that XLA was told to give a result's memory.
  at::Tensor Updated(int64_t operand, int64_t result) const {
    at::Tensor tensor = Operand(operand);
    if (tensor.numel() > 0 && tensor.data_ptr() != Result(result).data_ptr()) {
      throw std::runtime_error("XLA gave an updated operand two buffers");
    }
    return tensor;
  }

 private:
  at::Tensor Wrap(ffi::AnyBuffer buffer) const {
    const auto dims = buffer.dimensions();
    const at::IntArrayRef sizes(dims.begin(), dims.size());
    // Without a target device torch would ask CUDA where the pointer lies.
    return at::for_blob(buffer.untyped_data(), sizes)
        .options(at::TensorOptions()
                     .dtype(ToScalarType(buffer.element_type()))
                     .device(device_))
        .target_device(device_)
        .make_tensor();
  }

  ffi::RemainingArgs args_;
  ffi::RemainingRets rets_;
  c10::Device device_;
};

// A tensor that the operator writes, and what it was before.
struct Written {
  at::Tensor tensor;
  std::string argument;
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;
  void* data;
};

c10::IValue ToValue(const Frame& frame, const std::vector<Item>& items,
                    size_t* next);

template <typename List, typename Convert>
c10::IValue ToList(const Frame& frame, const std::vector<Item>& items,
                   size_t* next, int64_t size, Convert convert) {
  List list;
  for (int64_t i = 0; i < size; ++i) {
    list.push_back(convert(ToValue(frame, items, next)));
  }
  return list;
}

c10::IValue ToValue(const Frame& frame, const std::vector<Item>& items,
                    size_t* next) {
  using c10::IValue;
  const Item& item = items.at((*next)++);
  const auto list = [&](auto empty, auto convert) {
    return ToList<decltype(empty)>(frame, items, next, item.number, convert);
  };
  switch (item.kind) {
    case 't':
      return frame.Operand(item.number);
    case 'a':
      return frame.Updated(item.number, item.result);
    case 'r':
      return frame.Result(item.number);
    case 'n':
      return {};
    case 'D':
      return frame.device();
    case 'd':
      return ToScalarType(static_cast<ffi::DataType>(item.number));
    case 'i':
    case 'l':
    case 'm':
      return item.number;
    case 'f':
      return item.real;
    case 'b':
      return item.number != 0;
    case 's':
      return item.text;
    case 'T':
      return list(c10::List<at::Tensor>(),
                  [](const IValue& v) { return v.toTensor(); });
    case 'O':
      return list(c10::List<std::optional<at::Tensor>>(), [](const IValue& v) {
        return v.isNone() ? std::nullopt
                          : std::optional<at::Tensor>(v.toTensor());
      });
    case 'I':
      return list(c10::List<int64_t>(),
                  [](const IValue& v) { return v.toInt(); });
    case 'F':
      return list(c10::List<double>(),
                  [](const IValue& v) { return v.toDouble(); });
    case 'B':
      return list(c10::List<bool>(),
                  [](const IValue& v) { return v.toBool(); });
    case 'S':
      return list(c10::List<std::string>(),
                  [](const IValue& v) { return v.toStringRef(); });
    default:
      throw std::invalid_argument(std::string("unknown item ") + item.kind);
  }
}

// What the operator returned, one after the other.
std::vector<at::Tensor> Flatten(const std::vector<c10::IValue>& returned) {
  std::vector<at::Tensor> tensors;
  for (const c10::IValue& value : returned) {
    if (value.isTensorList()) {
      for (at::Tensor t : value.toTensorVector()) tensors.push_back(t);
    } else {
      tensors.push_back(value.toTensor());
    }
  }
  return tensors;
}

std::string Describe(const at::Tensor& t) {
  if (!t.defined()) return "nothing";
  return std::string(c10::toString(t.scalar_type())) + " of shape " +
         c10::str(t.sizes());
}

void Store(const at::Tensor& returned, at::Tensor result) {
  if (!returned.defined() || returned.sizes() != result.sizes() ||
      returned.scalar_type() != result.scalar_type()) {
    throw std::runtime_error("it returned " + Describe(returned) +
                             " where its meta kernel says " + Describe(result));
  }
  if (returned.data_ptr() != result.data_ptr()) result.copy_(returned);
}

void AddWritten(const c10::IValue& value, const std::string& argument,
                std::vector<Written>* written) {
  const auto add = [&](const at::Tensor& t, const std::string& name) {
    if (!t.defined()) return;
    written->push_back(
        {t, name, t.sizes().vec(), t.strides().vec(), t.data_ptr()});
  };
  if (value.isTensor()) {
    add(value.toTensor(), argument);
  } else if (value.isTensorList()) {
    const std::vector<at::Tensor> tensors = value.toTensorVector();
    for (size_t i = 0; i < tensors.size(); ++i) {
      add(tensors[i], argument + "[" + std::to_string(i) + "]");
    }
  }
}

// The user's tensor would not follow one that is given another shape, strides
// or memory: it is XLA's, and this one but wraps its buffer for the call.
void RequireKept(const std::vector<Written>& written) {
  for (const auto& [t, argument, sizes, strides, data] : written) {
    if (t.sizes() == at::IntArrayRef(sizes) &&
        t.strides() == at::IntArrayRef(strides) && t.data_ptr() == data) {
      continue;
    }
    throw std::runtime_error(
        argument + " must keep its memory, shape " +
        c10::str(at::IntArrayRef(sizes)) + " and strides " +
        c10::str(at::IntArrayRef(strides)) + ", got shape " +
        c10::str(t.sizes()) + " and strides " + c10::str(t.strides()));
  }
}

void Run(const Call& call, const Frame& frame) {
  // The thread may be the user's own, in the midst of a trace.
  const c10::impl::ForceDispatchKeyGuard keys(
      c10::impl::LocalDispatchKeySet(c10::impl::PODLocalDispatchKeySet{}));
  const c10::InferenceMode inference;
  std::vector<c10::IValue> stack;
  size_t next = 0;
  std::vector<Written> written;
  const auto& arguments = call.op.schema().arguments();
  while (next < call.items.size()) {
    const c10::Argument& argument = arguments.at(stack.size());
    stack.push_back(ToValue(frame, call.items, &next));
    const c10::AliasInfo* alias = argument.alias_info();
    if (alias != nullptr && alias->isWrite()) {
      AddWritten(stack.back(), argument.name(), &written);
    }
  }
  call.op.callBoxed(&stack);
  RequireKept(written);
  if (call.results.empty()) return;
  const std::vector<at::Tensor> returned = Flatten(stack);
  if (returned.size() != call.results.size()) {
    throw std::runtime_error(
        "it returned " + std::to_string(returned.size()) + " tensors where " +
        std::to_string(call.results.size()) + " were expected");
  }
  for (size_t i = 0; i < returned.size(); ++i) {
    if (call.results[i] < 0) continue;
    Store(returned[i], frame.Result(call.results[i]));
  }
}

// The operator of a text, for an error before it could be read.
std::string NameIn(std::string_view text) {
  return std::string(text.substr(0, text.find_first_of(" |")));
}

template <typename Body>
ffi::Error Guarded(std::string_view text, const Body& body) {
  std::string what;
  try {
    body();
    return ffi::Error::Success();
  } catch (const c10::Error& error) {
    what = error.what_without_backtrace();
  } catch (const std::exception& error) {
    what = error.what();
  } catch (...) {
    what = "an exception that is none of std";
  }
  return ffi::Error::Internal("torch_op: " + NameIn(text) + " failed: " + what);
}

ffi::Error RunOnHost(std::string_view text, ffi::RemainingArgs args,
                     ffi::RemainingRets rets) {
  return Guarded(text, [&] {
    Run(*Find(text), Frame(args, rets, c10::Device(c10::kCPU)));
  });
}

ffi::Error RunOnCuda(void* stream, std::string_view text,
                     ffi::RemainingArgs args, ffi::RemainingRets rets) {
  return Guarded(text, [&] {
    // Which device that is, XLA has set (core/registry.h).
    const c10::impl::VirtualGuardImpl impl(c10::kCUDA);
    const c10::Device device = impl.getDevice();
    // What c10::cuda::getStreamFromExternal makes, without CUDA's headers: the
    // id of a stream that is not torch's own is its address.
    const c10::StreamGuard guard(c10::Stream(
        c10::Stream::UNSAFE, device,
        static_cast<c10::StreamId>(reinterpret_cast<intptr_t>(stream))));
    Run(*Find(text), Frame(args, rets, device));
  });
}

auto HostBinding() {
  return ffi::Ffi::Bind()
      .Attr<std::string_view>("call")
      .RemainingArgs()
      .RemainingRets();
}

auto CudaBinding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<void*>>()
      .Attr<std::string_view>("call")
      .RemainingArgs()
      .RemainingRets();
}

}  // namespace

XLA_OPS_HANDLER_SYMBOL(xla_ops_torch_op_cpu, RunOnHost, HostBinding());
XLA_OPS_HANDLER_SYMBOL(xla_ops_torch_op_cuda, RunOnCuda, CudaBinding());
XLA_OPS_HANDLER_SYMBOL(xla_ops_torch_op_captured_cuda, RunOnCuda, CudaBinding(),
                       {::xla::ffi::Traits::kCmdBufferCompatible});

namespace on_host {
XLA_OPS_LIST_HANDLER(torch_op, "Host",
                     {nullptr, nullptr, nullptr, xla_ops_torch_op_cpu});
XLA_OPS_LIST_HANDLER(torch_op_captured, "Host",
                     {nullptr, nullptr, nullptr, xla_ops_torch_op_cpu});
}  // namespace on_host

namespace on_cuda {
XLA_OPS_LIST_HANDLER(torch_op, "CUDA",
                     {nullptr, nullptr, nullptr, xla_ops_torch_op_cuda});
XLA_OPS_LIST_HANDLER(torch_op_captured, "CUDA",
                     {nullptr, nullptr, nullptr,
                      xla_ops_torch_op_captured_cuda});
}  // namespace on_cuda

}  // namespace xla_ops
