// The pybind11 module `xla_ops._runtime`: op libraries, registration with XLA,
// direct calls. Each function's docstring is its contract; the work is done in
// the files beside this one. No function needs the GIL once its arguments are
// read.
//
// Tested by tests/core/test_runtime.py.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "xla_ops/cc/bridge/plugin_loader.h"
#include "xla_ops/cc/runtime/deadline.h"
#include "xla_ops/cc/runtime/direct_call.h"
#include "xla_ops/cc/runtime/elf_symbols.h"
#include "xla_ops/cc/runtime/lazy_tensors.h"
#include "xla_ops/cc/runtime/op_library.h"
#include "xla_ops/cc/runtime/registration.h"

namespace py = pybind11;

namespace xla_ops {
namespace {

[[noreturn]] void ThrowOsError(const std::string& text) {
  PyErr_SetString(PyExc_OSError, text.c_str());
  throw py::error_already_set();
}

void ThrowIfRuntimeError(const std::string& text) {
  if (!text.empty()) throw std::runtime_error(text);
}

using TargetList = std::vector<std::pair<std::string, std::string>>;

TargetList PyLoadLibrary(const std::string& path) {
  std::vector<const LoadedHandler*> handlers;
  std::string error;
  {
    py::gil_scoped_release release;
    error = LoadOpLibrary(path, &handlers);
  }
  if (!error.empty()) ThrowOsError(error);
  TargetList targets;
  for (const LoadedHandler* handler : handlers) {
    targets.emplace_back(handler->target, handler->platform);
  }
  return targets;
}

// What `ask` finds out of the op library at `path`.
template <typename Fact>
Fact AskOpLibrary(std::string (*ask)(const std::string&, Fact*),
                  const std::string& path) {
  Fact fact{};
  std::string error;
  {
    py::gil_scoped_release release;
    error = ask(path, &fact);
  }
  if (!error.empty()) ThrowOsError(error);
  return fact;
}

std::string PyCudaArchs(const std::string& path) {
  return AskOpLibrary(OpLibraryCudaArchs, path);
}

int PyCudaVersion(const std::string& path) {
  return AskOpLibrary(OpLibraryCudaVersion, path);
}

std::vector<int64_t> PyPlan(const std::string& path,
                            const std::string& function,
                            const std::vector<int64_t>& request,
                            size_t num_results) {
  std::vector<int64_t> plan(num_results);
  bool refused = false;
  std::string error;
  {
    py::gil_scoped_release release;
    error = AskOpLibraryForPlan(path, function, request, &plan, &refused);
  }
  if (refused) throw py::value_error(function + ": " + error);
  if (!error.empty()) ThrowOsError(error);
  return plan;
}

Outcomes PyRegisterCpu(const std::string& path) {
  Outcomes outcomes;
  std::string error;
  {
    py::gil_scoped_release release;
    error = RegisterCpuHandlers(path, &outcomes);
  }
  ThrowIfRuntimeError(error);
  return outcomes;
}

Outcomes PyRegisterGpu(const std::string& path) {
  Outcomes outcomes;
  std::string error;
  {
    py::gil_scoped_release release;
    error = RegisterGpuHandlers(path, &outcomes);
  }
  ThrowIfRuntimeError(error);
  return outcomes;
}

void PyOpenPlugin(const std::string& bridge_path,
                  const std::string& plugin_path) {
  std::string error;
  {
    py::gil_scoped_release release;
    error = OpenBridgePlugin(bridge_path, plugin_path);
  }
  ThrowIfRuntimeError(error);
}

py::dict PyFindPluginInfo(const std::string& path) {
  PjrtPlugin plugin;
  std::string error;
  {
    py::gil_scoped_release release;
    error = OpenPjrtPlugin(path, &plugin);
  }
  py::dict info;
  info["path"] = path;
  info["error"] = error;
  info["fix"] = plugin.fix;
  info["warning"] = error.empty() ? PjrtPluginWarning(path, *plugin.api) : "";
  info["major"] = py::none();
  info["minor"] = py::none();
  if (plugin.api != nullptr) {
    info["major"] = plugin.api->version.major_version;
    info["minor"] = plugin.api->version.minor_version;
  }
  py::list extensions;
  for (const PjrtExtension* extension : plugin.extensions) {
    extensions.append(extension->type);
  }
  info["extensions"] = extensions;
  info["custom_call"] = plugin.custom_call != nullptr;
  return info;
}

std::map<std::string, uint64_t> PyFindSymbols(
    const std::string& path, const std::vector<std::string>& names) {
  ElfSymbols symbols;
  std::string error;
  {
    py::gil_scoped_release release;
    error = FindElfSymbols(path, names, &symbols);
  }
  ThrowIfRuntimeError(error);
  return symbols;
}

// (address, XLA_FFI_DataType, dims)
using PyBuffer = std::tuple<uintptr_t, int, std::vector<int64_t>>;

std::vector<DirectBuffer> ToBuffers(const std::vector<PyBuffer>& buffers,
                                    const char* kind) {
  std::vector<DirectBuffer> out;
  out.reserve(buffers.size());
  for (size_t i = 0; i < buffers.size(); ++i) {
    const auto& [address, dtype, dims] = buffers[i];
    for (int64_t dim : dims) {
      if (dim >= 0) continue;
      throw py::value_error("call: dims of " + std::string(kind) + " " +
                            std::to_string(i) + " must be at least 0, got " +
                            std::to_string(dim));
    }
    out.push_back({reinterpret_cast<void*>(address),
                   static_cast<XLA_FFI_DataType>(dtype), dims});
  }
  return out;
}

DirectAttr ToListAttr(const std::string& name, py::handle value) {
  const auto items = py::reinterpret_borrow<py::sequence>(value);
  bool all_ints = true;
  for (py::handle item : items) {
    const bool is_int = PyLong_Check(item.ptr()) && !PyBool_Check(item.ptr());
    if (!is_int && !PyFloat_Check(item.ptr())) {
      throw py::type_error("call: items of attribute " + name +
                           " must be int or float, got " +
                           Py_TYPE(item.ptr())->tp_name);
    }
    all_ints = all_ints && is_int;
  }
  if (all_ints) return value.cast<std::vector<int64_t>>();
  return value.cast<std::vector<float>>();
}

DirectAttr ToAttr(const std::string& name, py::handle value) {
  PyObject* object = value.ptr();
  // bool first: it is a kind of int in Python.
  if (PyBool_Check(object)) return object == Py_True;
  if (PyLong_Check(object)) return value.cast<int64_t>();
  if (PyFloat_Check(object)) return static_cast<float>(value.cast<double>());
  if (PyUnicode_Check(object)) return value.cast<std::string>();
  if (PyList_Check(object) || PyTuple_Check(object)) {
    return ToListAttr(name, value);
  }
  throw py::type_error("call: attribute " + name +
                       " must be bool, int, float, str or a list of numbers, "
                       "got " +
                       Py_TYPE(object)->tp_name);
}

void PyCall(const std::string& target, const std::string& platform,
            uintptr_t stream, const std::vector<PyBuffer>& args,
            const std::vector<PyBuffer>& results, const py::dict& attrs) {
  const LoadedHandler* handler = FindHandler(target, platform);
  if (handler == nullptr) {
    throw std::runtime_error("no loaded op library has a handler " + target +
                             " for platform " + platform);
  }
  const std::vector<DirectBuffer> c_args = ToBuffers(args, "argument");
  const std::vector<DirectBuffer> c_results = ToBuffers(results, "result");
  DirectAttrs c_attrs;
  for (const auto& [name, value] : attrs) {
    const auto key = name.cast<std::string>();
    c_attrs.emplace(key, ToAttr(key, value));
  }
  CallStatus status;
  {
    py::gil_scoped_release release;
    status = CallHandler(*handler, reinterpret_cast<void*>(stream), c_args,
                         c_results, c_attrs);
  }
  if (status.ok()) return;
  if (status.code == XLA_FFI_Error_Code_INVALID_ARGUMENT) {
    throw py::value_error(status.message);
  }
  throw std::runtime_error(status.message);
}

// The lazy tensors of this process; Python sees to it that it is loaded once.
LazyTensors lazy_tensors;

void CheckLazyTensor(uintptr_t tensor) {
  if (lazy_tensors.Knows(tensor)) return;
  throw py::type_error("a tensor must be one of torch_xla's own, got another");
}

int64_t PyLazyTensorId(uintptr_t tensor) {
  CheckLazyTensor(tensor);
  return lazy_tensors.Id(tensor);
}

std::vector<std::pair<int, int>> PyBufferHolders(
    const std::vector<uintptr_t>& tensors) {
  std::vector<std::pair<int, int>> found;
  found.reserve(tensors.size());
  for (const uintptr_t tensor : tensors) {
    CheckLazyTensor(tensor);
    const BufferHolders holders = lazy_tensors.Holders(tensor);
    found.emplace_back(holders.data, holders.node);
  }
  return found;
}

bool PyIsCopied(uintptr_t tensor, const std::vector<uintptr_t>& readers) {
  CheckLazyTensor(tensor);
  for (const uintptr_t reader : readers) CheckLazyTensor(reader);
  return lazy_tensors.IsCopied(tensor, readers);
}

PYBIND11_MODULE(_runtime, m) {
  m.doc() = "Loads op libraries, registers their handlers, calls them.";
  m.def("load_library", &PyLoadLibrary, py::arg("path"),
        R"(Loads an op library; does nothing if it is loaded already.

Returns: (target, platform) of each handler in it; platform is "Host" or "CUDA".
Raises OSError naming the file and what is wrong with it.)");
  m.def("cuda_archs", &PyCudaArchs, py::arg("path"),
        R"(The architectures of an op library's device code.

Returns: such as "8.0 9.0a 12.0+PTX"; "" for a library without device code.
Raises OSError as load_library, which it calls.)");
  m.def("cuda_version", &PyCudaVersion, py::arg("path"),
        R"(The CUDA that an op library was built with.

Returns: such as 13000 for 13.0; 0 for a library without device code.
Raises OSError as load_library, which it calls.)");
  m.def("plan", &PyPlan, py::arg("path"), py::arg("function"),
        py::arg("request"), py::arg("num_results"),
        R"(Asks an op library what a call needs of its caller.

Args:
  function: such as "xla_ops_attention_plan"; both its structs are int64 fields
    behind their size.
  request: the request's fields.
  num_results: how many fields of the plan are wanted.
Returns: those fields.
Raises ValueError with the library's text for a wrong request, and OSError as
load_library, which it calls, or where the library has no such function.)");
  m.def("register_cpu", &PyRegisterCpu, py::arg("xlac_path"),
        R"(Registers the loaded Host handlers with torch_xla's CPU client.

Args:
  xlac_path: file of the imported module _XLAC.
Returns: each target that this call tried, and why it was refused, "" if it was
not; {} when all were registered before.
Raises RuntimeError where the client's registry cannot be found.)");
  m.def("register_gpu", &PyRegisterGpu, py::arg("bridge_path"),
        R"(Registers the loaded CUDA handlers, all stages, with the PJRT plugin
that the bridge has open.

Returns: as register_cpu.
Raises RuntimeError where the bridge cannot be loaded.)");
  m.def("registered", &RegisteredTargets,
        py::call_guard<py::gil_scoped_release>(),
        "The registered targets by platform: {\"Host\": [...], \"CUDA\": "
        "[...]}.");
  m.def("call", &PyCall, py::arg("target"), py::arg("platform"),
        py::arg("stream"), py::arg("args"), py::arg("results"),
        py::arg("attrs"),
        R"(Runs a loaded handler on memory given by address, without XLA.

Args:
  stream: address of a cudaStream_t; CUDA handlers alone use it.
  args, results: (address, XLA_FFI_DataType, dims) of dense row-major arrays,
    which must stay alive until the stream has run.
  attrs: bool as PRED, int as S64, float as F32, str, and lists of int (S64) or
    float (F32).
Raises ValueError with the handler's text for an invalid argument, else
RuntimeError.)");
  m.def("open_plugin", &PyOpenPlugin, py::arg("bridge_path"),
        py::arg("plugin_path"),
        R"(Has the bridge wrap the PJRT plugin at plugin_path.

Raises RuntimeError, naming the fix, for a plugin that cannot be used, and for a
second plugin in one process.)");
  m.def(
      "set_compile_options",
      [](const std::string& bridge_path, const py::bytes& options) {
        const std::string error = SetCompileOptions(bridge_path, options);
        ThrowIfRuntimeError(error);
      },
      py::arg("bridge_path"), py::arg("options"),
      R"(Has the bridge add options to what this thread compiles from now on.

Args:
  options: a serialized CompileOptionsProto; empty for none.
Raises RuntimeError where the bridge cannot be loaded.)");
  m.def("start_deadline", &StartDeadline, py::arg("milliseconds"),
        py::arg("text"),
        "Ends the process with status 1 after so long, and `text` on stderr, "
        "unless end_deadline() comes before: also where something waits with "
        "the GIL held. Another takes its place.");
  m.def("end_deadline", &EndDeadline,
        "Calls off what start_deadline began, if it did.");
  m.def("find_plugin_info", &PyFindPluginInfo, py::arg("path"),
        R"(Opens a PJRT plugin, without a client, and reads what it offers.

Returns: {"path", "error" and "fix", what is wrong and what to do ("" if it can be
used), "warning" ("" if it is not newer than what was tested), "major", "minor"
(None if they cannot be read), "extensions" (list of PJRT_Extension_Type),
"custom_call"}.)");
  m.def(
      "load_lazy_tensors",
      [](const std::string& library, const std::string& xlac_path,
         uintptr_t tensor) {
        ThrowIfRuntimeError(lazy_tensors.Load(library, xlac_path, tensor));
      },
      py::arg("library"), py::arg("xlac_path"), py::arg("tensor"),
      "Makes the three functions below usable; library is the path of "
      "libtorch_cpu.so, xlac_path that of the imported module _XLAC, tensor "
      "the address of a TensorImpl of torch_xla's. RuntimeError with the "
      "reason where the library is another.");
  m.def("lazy_tensor_id", &PyLazyTensorId, py::arg("tensor"),
        "torch_xla's number of a tensor, given by the address of its "
        "TensorImpl; TypeError where that is not torch_xla's.");
  m.def(
      "buffer_holders", &PyBufferHolders, py::arg("tensors"),
      R"(How many hold each tensor's device data and IR node, the tensor itself
counted; 0 where it has none. Tensors are addresses of a TensorImpl of torch_xla's;
TypeError for another's.)");
  m.def(
      "is_copied", &PyIsCopied, py::arg("tensor"), py::arg("readers"),
      R"(Whether another tensor is a copy of `tensor` that waits to be computed.

Both arguments are of addresses of a TensorImpl of torch_xla's; TypeError for
another's. It is soon told where `readers` are all that waits for the tensor.)");
  m.def("_find_symbols", &PyFindSymbols, py::arg("path"), py::arg("names"),
        "Values of function symbols in an ELF file's .symtab; RuntimeError "
        "with the reason where there are none. For tests and the doctor.");
}

}  // namespace
}  // namespace xla_ops
