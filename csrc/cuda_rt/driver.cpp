// Pinning, copies and callbacks through the CUDA driver API, found at run time: one library serves machines
// with and without a GPU, and any driver since CUDA 11.
//
// Handles are passed as the integers that torch exposes (stream.cuda_stream, event.cuda_event, data_ptr()).
#include <dlfcn.h>

#include <cstdint>

#include "error.h"
#include "lss.h"

namespace {

using Result = int;  // CUresult
using Device = int;
using Context = void *;

constexpr unsigned kHostRegisterPortable = 1;

struct Driver {
    Result (*init)(unsigned) = nullptr;
    Result (*device_count)(int *) = nullptr;
    Result (*device_get)(Device *, int) = nullptr;
    Result (*context_current)(Context *) = nullptr;
    Result (*context_set)(Context) = nullptr;
    Result (*primary_retain)(Context *, Device) = nullptr;
    Result (*host_register)(void *, size_t, unsigned) = nullptr;
    Result (*host_unregister)(void *) = nullptr;
    Result (*d2h)(void *, uint64_t, size_t, void *) = nullptr;
    Result (*h2d)(uint64_t, const void *, size_t, void *) = nullptr;
    Result (*event_record)(void *, void *) = nullptr;
    Result (*wait_event)(void *, void *, unsigned) = nullptr;
    Result (*launch_host)(void *, void (*)(void *), void *) = nullptr;
    Result (*error_name)(Result, const char **) = nullptr;
    int count = 0;
    const char *missing = nullptr;  // why there is no CUDA
    Result failed = 0;
};

template <class F>
void find(Driver &driver, void *library, const char *name, F *&function) {
    function = reinterpret_cast<F *>(dlsym(library, name));
    if (!function && !driver.missing) driver.missing = name;
}

const Driver &driver() {
    static const Driver loaded = [] {
        Driver d;
        void *const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);  // stays loaded
        if (!library) {
            d.missing = "libcuda.so.1";
            return d;
        }
        find(d, library, "cuInit", d.init);
        find(d, library, "cuDeviceGetCount", d.device_count);
        find(d, library, "cuDeviceGet", d.device_get);
        find(d, library, "cuCtxGetCurrent", d.context_current);
        find(d, library, "cuCtxSetCurrent", d.context_set);
        find(d, library, "cuDevicePrimaryCtxRetain", d.primary_retain);
        find(d, library, "cuMemHostRegister_v2", d.host_register);
        find(d, library, "cuMemHostUnregister", d.host_unregister);
        find(d, library, "cuMemcpyDtoHAsync_v2", d.d2h);
        find(d, library, "cuMemcpyHtoDAsync_v2", d.h2d);
        find(d, library, "cuEventRecord", d.event_record);
        find(d, library, "cuStreamWaitEvent", d.wait_event);
        find(d, library, "cuLaunchHostFunc", d.launch_host);
        find(d, library, "cuGetErrorName", d.error_name);
        if (d.missing) return d;
        d.failed = d.init(0);
        if (d.failed == 0) d.failed = d.device_count(&d.count);
        if (d.failed != 0 || d.count == 0) d.missing = "a usable device";
        return d;
    }();
    return loaded;
}

int32_t check(Result result, const char *call) {
    if (result == 0) return LSS_OK;
    const char *name = nullptr;
    driver().error_name(result, &name);
    return lss::fail(LSS_ERR_CUDA, "%s failed: %s (%d)", call, name ? name : "unknown error", result);
}

// A thread that torch has not used yet has no current context.
int32_t enter(int32_t device) {
    const Driver &d = driver();
    if (d.missing) return lss::fail(LSS_ERR_NO_CUDA, "no CUDA: %s was not found (status %d)", d.missing, d.failed);
    if (device < 0 || device >= d.count) {
        return lss::fail(LSS_ERR_ARGUMENT, "expected a CUDA device from 0 to %d, found %d", d.count - 1, device);
    }
    Context context = nullptr;
    int32_t status = check(d.context_current(&context), "cuCtxGetCurrent");
    if (status != LSS_OK || context) return status;
    Device handle = 0;
    status = check(d.device_get(&handle, device), "cuDeviceGet");
    if (status != LSS_OK) return status;
    status = check(d.primary_retain(&context, handle), "cuDevicePrimaryCtxRetain");
    return status != LSS_OK ? status : check(d.context_set(context), "cuCtxSetCurrent");
}

}  // namespace

extern "C" {

int32_t lss_cu_device_count(int32_t *count) {
    const Driver &d = driver();
    *count = d.missing ? 0 : d.count;
    if (d.missing) return lss::fail(LSS_ERR_NO_CUDA, "no CUDA: %s was not found (status %d)", d.missing, d.failed);
    return LSS_OK;
}

int32_t lss_cu_pin(int32_t device, void *memory, size_t nbytes) {
    const int32_t status = enter(device);
    if (status != LSS_OK) return status;
    return check(driver().host_register(memory, nbytes, kHostRegisterPortable), "cuMemHostRegister");
}

int32_t lss_cu_unpin(int32_t device, void *memory) {
    const int32_t status = enter(device);
    return status != LSS_OK ? status : check(driver().host_unregister(memory), "cuMemHostUnregister");
}

int32_t lss_cu_d2h_batch(int32_t device, void *stream, void *const *dst, const uint64_t *src, const size_t *nbytes,
                         int64_t num_copies) {
    int32_t status = enter(device);
    for (int64_t i = 0; status == LSS_OK && i < num_copies; ++i) {
        if (nbytes[i] > 0) status = check(driver().d2h(dst[i], src[i], nbytes[i], stream), "cuMemcpyDtoHAsync");
    }
    return status;
}

int32_t lss_cu_h2d_batch(int32_t device, void *stream, const uint64_t *dst, const void *const *src,
                         const size_t *nbytes, int64_t num_copies) {
    int32_t status = enter(device);
    for (int64_t i = 0; status == LSS_OK && i < num_copies; ++i) {
        if (nbytes[i] > 0) status = check(driver().h2d(dst[i], src[i], nbytes[i], stream), "cuMemcpyHtoDAsync");
    }
    return status;
}

int32_t lss_cu_event_record(int32_t device, void *event, void *stream) {
    const int32_t status = enter(device);
    return status != LSS_OK ? status : check(driver().event_record(event, stream), "cuEventRecord");
}

int32_t lss_cu_stream_wait_event(int32_t device, void *stream, void *event) {
    const int32_t status = enter(device);
    return status != LSS_OK ? status : check(driver().wait_event(stream, event, 0), "cuStreamWaitEvent");
}

int32_t lss_cu_launch_notify(int32_t device, void *stream, lss_ticket *ticket) {
    int32_t status = enter(device);
    if (status != LSS_OK) return status;
    lss_ticket_ref(ticket);  // dropped by lss_notify
    status = check(driver().launch_host(stream, lss_notify, ticket), "cuLaunchHostFunc");
    if (status != LSS_OK) lss_ticket_free(ticket);
    return status;
}

}  // extern "C"
