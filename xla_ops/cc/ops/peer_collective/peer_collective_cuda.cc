// The CUDA handler of xla_ops.peer_collective, and the groups that it works in.
//
// Run by tests/gpu/check_peers.py.

#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "xla/ffi/api/ffi.h"
#include "xla_ops/cc/core/checks.h"
#include "xla_ops/cc/core/error.h"
#include "xla_ops/cc/core/ffi_dtype.h"
#include "xla_ops/cc/core/numbered.h"
#include "xla_ops/cc/device/cuda_handler.h"
#include "xla_ops/cc/device/with_device.h"
#include "xla_ops/cc/ops/peer_collective/peer_collective.h"
#include "xla_ops/cc/ops/peer_collective/peer_collective_launch.h"

namespace xla_ops {
namespace {

constexpr char kOp[] = "peer_collective";
static_assert(sizeof(cudaIpcMemHandle_t) ==
              XLA_OPS_PEER_HANDLE_WORDS * sizeof(int64_t));

struct Member {
  int device;
  bool is_open;
  PeerGroup group;
};

const char* Make(const XlaOpsPeerGroupRequest& request,
                 XlaOpsPeerGroup* result) {
  if (request.size < 2 || request.size > XLA_OPS_PEER_GROUP_MAX_RANKS) {
    return "size must be 2 to 8";
  }
  if (request.rank < 0 || request.rank >= request.size) {
    return "rank must be below size";
  }
  if (request.slot_bytes < 8 || request.slot_bytes % kPeerUnitBytes != 0) {
    return "slot_bytes must be a multiple of 8";
  }
  if (request.timeout_ms < 1) return "timeout_ms must be positive";
  const int device = static_cast<int>(request.device);
  const WithDevice with_device(device);
  if (with_device.error() != cudaSuccess) {
    return CudaErrorText("device cannot be used", with_device.error());
  }
  const int64_t units = request.slot_bytes / kPeerUnitBytes;
  const int64_t bytes = PeerMemoryBytes(request.size, units);
  void* memory = nullptr;
  cudaError_t error = cudaMalloc(&memory, static_cast<size_t>(bytes));
  if (error != cudaSuccess)
    return CudaErrorText("no memory for packets", error);
  // No call has the number 0.
  error = cudaMemset(memory, 0, static_cast<size_t>(bytes));
  if (error == cudaSuccess) error = cudaDeviceSynchronize();
  cudaIpcMemHandle_t handle;
  if (error == cudaSuccess) error = cudaIpcGetMemHandle(&handle, memory);
  if (error != cudaSuccess) {
    const char* said = CudaErrorText("memory cannot be shared", error);
    static_cast<void>(cudaFree(memory));
    return said;
  }
  std::memcpy(result->handle, &handle, sizeof(handle));
  auto member = std::make_unique<Member>();
  member->device = device;
  member->is_open = false;
  member->group = {};
  member->group.memory[request.rank] = static_cast<char*>(memory);
  member->group.rank = static_cast<int>(request.rank);
  member->group.size = static_cast<int>(request.size);
  member->group.slot_units = units;
  member->group.timeout_ns =
      static_cast<uint64_t>(request.timeout_ms) * 1'000'000;
  result->group = Numbered<Member>::All().Add(std::move(member));
  return nullptr;
}

const char* Open(const XlaOpsPeerHandles& request) {
  Member* const member = Numbered<Member>::All().Find(request.group);
  if (member == nullptr || member->is_open) {
    return "group must be one that was made and is not open";
  }
  const WithDevice with_device(member->device);
  if (with_device.error() != cudaSuccess) {
    return CudaErrorText("device cannot be used", with_device.error());
  }
  for (int rank = 0; rank < member->group.size; ++rank) {
    if (rank == member->group.rank) continue;
    cudaIpcMemHandle_t handle;
    std::memcpy(&handle, request.handles[rank], sizeof(handle));
    void* memory = nullptr;
    const cudaError_t error =
        cudaIpcOpenMemHandle(&memory, handle, cudaIpcMemLazyEnablePeerAccess);
    if (error != cudaSuccess) {
      return CudaErrorText("another rank's memory cannot be opened", error);
    }
    member->group.memory[rank] = static_cast<char*>(memory);
  }
  member->is_open = true;
  return nullptr;
}

auto PeerCollectiveBinding() {
  return ffi::Ffi::Bind()
      .Arg<ffi::AnyBuffer>()  // input
      .Arg<ffi::AnyBuffer>()  // after
      .Ret<ffi::AnyBuffer>()  // out
      .Attr<int64_t>("group")
      .Attr<bool>("gathers");
}

// The group of a call whose input this is.
ffi::Error FindGroup(const char* op, int64_t number, ffi::AnyBuffer input,
                     PeerGroup* group) {
  const Member* const member = Numbered<Member>::All().Find(number);
  if (member == nullptr || !member->is_open) {
    return MustError(op, "group", "be one that this process has opened",
                     std::to_string(number));
  }
  int device = -1;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return ToLaunchError(op, error);
  if (device != member->device) {
    return MustError(op, "input",
                     "be on device " + std::to_string(member->device) +
                         ", which the group was made with",
                     std::to_string(device));
  }
  *group = member->group;
  const int64_t bytes = static_cast<int64_t>(input.size_bytes());
  const int64_t most = group->slot_units * kPeerUnitBytes;
  if (bytes > most || bytes % kPeerUnitBytes != 0) {
    return MustError(
        op, "input",
        "be of a multiple of 8 bytes and at most " + std::to_string(most),
        std::to_string(bytes));
  }
  return ffi::Error::Success();
}

ffi::Error MakePeerCollectiveParams(ffi::AnyBuffer input, ffi::AnyBuffer after,
                                    ffi::Result<ffi::AnyBuffer> out,
                                    int64_t group, bool gathers,
                                    PeerCollectiveParams* params) {
  (void)after;
  XLA_OPS_RETURN_IF_ERROR(FindGroup(kOp, group, input, &params->group));
  const std::optional<DType> dtype = ToDType(input.element_type());
  const bool can_add =
      dtype == DType::kF32 || dtype == DType::kF16 || dtype == DType::kBF16;
  if (!gathers && !can_add) {
    return MustError(kOp, "input", "be float32, float16 or bfloat16",
                     DTypeName(input.element_type()));
  }
  const int64_t bytes = static_cast<int64_t>(input.size_bytes());
  const int64_t copies = gathers ? params->group.size : 1;
  if (out->element_type() != input.element_type() ||
      static_cast<int64_t>(out->size_bytes()) != copies * bytes) {
    return MustError(
        kOp, "out", "be " + std::to_string(copies) + " inputs",
        DTypeName(out->element_type()) + " " + FormatShape(out->dimensions()));
  }
  params->gathers = gathers;
  params->dtype = dtype.value_or(DType::kF32);
  params->input = input.untyped_data();
  params->out = out->untyped_data();
  params->bytes = bytes;
  return ffi::Error::Success();
}

constexpr char kNormOp[] = "peer_add_rms_norm";

auto PeerAddRmsNormBinding() {
  return ffi::Ffi::Bind()
      .Arg<ffi::AnyBuffer>()  // input
      .Arg<ffi::AnyBuffer>()  // after
      .Arg<ffi::AnyBuffer>()  // residual
      .Arg<ffi::AnyBuffer>()  // weight
      .Ret<ffi::AnyBuffer>()  // out
      .Ret<ffi::AnyBuffer>()  // residual_out
      .Attr<int64_t>("group")
      .Attr<float>("eps");
}

ffi::Error MakePeerAddRmsNormParams(ffi::AnyBuffer input, ffi::AnyBuffer after,
                                    ffi::AnyBuffer residual,
                                    ffi::AnyBuffer weight,
                                    ffi::Result<ffi::AnyBuffer> out,
                                    ffi::Result<ffi::AnyBuffer> residual_out,
                                    int64_t group, float eps,
                                    PeerAddRmsNormParams* params) {
  (void)after;
  int64_t hidden_size = 0;
  XLA_OPS_RETURN_IF_ERROR(FindGroup(kNormOp, group, input, &params->group));
  XLA_OPS_RETURN_IF_ERROR(BindRows(kNormOp, input, &params->dtype,
                                   &params->num_rows, &hidden_size));
  XLA_OPS_RETURN_IF_ERROR(CheckSameAs(kNormOp, "residual", residual, input));
  XLA_OPS_RETURN_IF_ERROR(
      CheckDType(kNormOp, "weight", weight, {params->dtype}));
  XLA_OPS_RETURN_IF_ERROR(CheckShape(kNormOp, "weight", weight, {hidden_size}));
  XLA_OPS_RETURN_IF_ERROR(CheckSameAs(kNormOp, "out", out, input));
  XLA_OPS_RETURN_IF_ERROR(
      CheckSameAs(kNormOp, "residual_out", residual_out, input));
  XLA_OPS_RETURN_IF_ERROR(CheckPositiveFinite(kNormOp, "eps", eps));
  const int64_t row_bytes = static_cast<int64_t>(weight.size_bytes());
  if (row_bytes > kPeerMaxRowUnits * kPeerUnitBytes ||
      row_bytes % kPeerUnitBytes != 0) {
    return MustError(kNormOp, "input",
                     "have rows of a multiple of 8 bytes and at most " +
                         std::to_string(kPeerMaxRowUnits * kPeerUnitBytes),
                     std::to_string(row_bytes));
  }
  params->row_units = row_bytes / kPeerUnitBytes;
  params->eps = eps;
  params->input = input.untyped_data();
  params->residual = residual.untyped_data();
  params->weight = weight.untyped_data();
  params->out = out->untyped_data();
  params->residual_out = residual_out->untyped_data();
  return ffi::Error::Success();
}

}  // namespace

XLA_OPS_CUDA_HANDLER(peer_add_rms_norm, PeerAddRmsNormBinding(),
                     MakePeerAddRmsNormParams, LaunchPeerAddRmsNorm);

XLA_OPS_CUDA_HANDLER(peer_collective, PeerCollectiveBinding(),
                     MakePeerCollectiveParams, LaunchPeerCollective);

}  // namespace xla_ops

const char* xla_ops_peer_group_make(const XlaOpsPeerGroupRequest* request,
                                    XlaOpsPeerGroup* group) {
  return xla_ops::Make(*request, group);
}

const char* xla_ops_peer_group_open(const XlaOpsPeerHandles* handles,
                                    XlaOpsPeerGroupReady* ready) {
  const char* said = xla_ops::Open(*handles);
  ready->ready = said == nullptr;
  return said;
}
