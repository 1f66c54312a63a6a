// What the launcher needs of the CUDA driver, found at run time: libcuda is not
// linked, and no CUDA header is needed, so that tests run on any machine, with
// a table of fakes.
//
// Types and numbers are those of cuda.h, which are part of the driver's stable
// ABI. The functions that handle code by library (cuLibraryLoadData) came with
// CUDA 12.0: code is loaded once a process and serves every context.
//
// Tested by launch_test.cc.

#ifndef XLA_OPS_CC_LAUNCH_DRIVER_H_
#define XLA_OPS_CC_LAUNCH_DRIVER_H_

#include <cstddef>
#include <cstdint>
#include <string>

namespace xla_ops {

using CuResult = int;  // 0: success
using CuDevice = int;

// CUlaunchAttribute: of its value, 64 bytes, only a cluster's size is set.
struct CuLaunchAttribute {
  int id;
  char padding[4];
  unsigned value[16];
};
inline constexpr int kCuLaunchAttributeClusterDimension = 4;

// CUlaunchConfig.
struct CuLaunchConfig {
  unsigned grid[3];
  unsigned block[3];
  unsigned shared_bytes;
  void* stream;
  CuLaunchAttribute* attributes;
  unsigned num_attributes;
};
static_assert(sizeof(CuLaunchAttribute) == 72, "as in cuda.h");
static_assert(sizeof(CuLaunchConfig) == 56, "as in cuda.h");

inline constexpr CuResult kCuInvalidContext = 201;

// CUdevice_attribute and CUfunction_attribute.
inline constexpr int kCuMaxSharedBytesPerBlock = 97;  // with leave asked for
inline constexpr int kCuKernelMaxThreads = 0;
inline constexpr int kCuKernelStaticSharedBytes = 1;
inline constexpr int kCuKernelMaxDynamicSharedBytes = 8;

// Libraries, kernels and functions are handles.
struct CuDriver {
  CuResult (*init)(unsigned flags);
  CuResult (*get_error_name)(CuResult, const char** name);
  CuResult (*get_error_string)(CuResult, const char** text);
  CuResult (*current_device)(CuDevice*);
  CuResult (*device_attribute)(int* value, int attribute, CuDevice);
  CuResult (*load_library)(void** library, const void* image, int* jit_options,
                           void** jit_values, unsigned num_jit_options,
                           int* library_options, void** library_values,
                           unsigned num_library_options);
  CuResult (*get_kernel)(void** kernel, void* library, const char* name);
  CuResult (*kernel_function)(void** function, void* kernel);
  CuResult (*kernel_attribute)(int* value, int attribute, void* kernel,
                               CuDevice);
  CuResult (*set_kernel_attribute)(int attribute, int value, void* kernel,
                                   CuDevice);
  CuResult (*launch)(const CuLaunchConfig*, void* kernel, void** parameters,
                     void** extra);
  // For guarded results alone; addresses are the device's.
  CuResult (*fill)(uint64_t to, unsigned char value, size_t size, void* stream);
  CuResult (*copy)(uint64_t to, uint64_t from, size_t size, void* stream);
  CuResult (*copy_to_host)(void* to, uint64_t from, size_t size);
  CuResult (*synchronize)(void* stream);
  CuResult (*is_capturing)(void* stream, int* status);  // 0: it is not
  // Since CUDA 12.4; null before.
  CuResult (*kernel_parameter)(void* kernel, size_t index, size_t* offset,
                               size_t* size);
};

// The driver of this machine, or null and why there is none.
const CuDriver* FindCuDriver(std::string* error);

// "CUDA_ERROR_INVALID_VALUE: invalid argument".
std::string CuErrorText(const CuDriver& driver, CuResult result);

}  // namespace xla_ops

#endif  // XLA_OPS_CC_LAUNCH_DRIVER_H_
