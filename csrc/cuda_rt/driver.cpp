// Pinning, copies and callbacks through the CUDA driver API, found at run time: one library serves machines
// with and without a GPU, and any driver since CUDA 11.
//
// Handles are passed as the integers that torch exposes (stream.cuda_stream, event.cuda_event, data_ptr()).
#include <dlfcn.h>

#include <cstdint>
#include <map>
#include <mutex>

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
    Result (*context_synchronize)() = nullptr;
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
        find(d, library, "cuCtxSynchronize", d.context_synchronize);
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

// The primary context of a device, which torch uses too. Retained once, for the rest of the process.
int32_t primary_context(int32_t device, Context *context) {
    static std::mutex mutex;
    static std::map<int32_t, Context> retained;
    const Driver &d = driver();
    if (d.missing) return lss::fail(LSS_ERR_NO_CUDA, "no CUDA: %s was not found (status %d)", d.missing, d.failed);
    if (device < 0 || device >= d.count) {
        return lss::fail(LSS_ERR_ARGUMENT, "expected a CUDA device from 0 to %d, found %d", d.count - 1, device);
    }
    const std::lock_guard<std::mutex> lock(mutex);
    const auto known = retained.find(device);
    if (known == retained.end()) {
        Device handle = 0;
        int32_t status = check(d.device_get(&handle, device), "cuDeviceGet");
        if (status == LSS_OK) status = check(d.primary_retain(context, handle), "cuDevicePrimaryCtxRetain");
        if (status == LSS_OK) retained[device] = *context;
        return status;
    }
    *context = known->second;
    return LSS_OK;
}

// While it lives, a device's context is current in the calling thread, which may have none or another's.
class Entered {
public:
    explicit Entered(int32_t device) {
        Context wanted = nullptr;
        status = primary_context(device, &wanted);
        if (status == LSS_OK) status = check(driver().context_current(&before_), "cuCtxGetCurrent");
        if (status != LSS_OK || before_ == wanted) return;
        status = check(driver().context_set(wanted), "cuCtxSetCurrent");
        changed_ = status == LSS_OK;
    }
    ~Entered() {
        if (changed_) driver().context_set(before_);
    }
    Entered(const Entered &) = delete;
    Entered &operator=(const Entered &) = delete;

    int32_t status = LSS_OK;

private:
    Context before_ = nullptr;
    bool changed_ = false;
};

}  // namespace

extern "C" {

int32_t lss_cu_device_count(int32_t *count) {
    const Driver &d = driver();
    *count = d.missing ? 0 : d.count;
    if (d.missing) return lss::fail(LSS_ERR_NO_CUDA, "no CUDA: %s was not found (status %d)", d.missing, d.failed);
    return LSS_OK;
}

int32_t lss_cu_pin(int32_t device, void *memory, size_t nbytes) {
    const Entered entered(device);
    if (entered.status != LSS_OK) return entered.status;
    return check(driver().host_register(memory, nbytes, kHostRegisterPortable), "cuMemHostRegister");
}

int32_t lss_cu_unpin(int32_t device, void *memory) {
    const Entered entered(device);
    if (entered.status != LSS_OK) return entered.status;
    // A failed wait is a failure of the device's earlier work, which torch reports: the memory is unregistered anyway.
    driver().context_synchronize();
    return check(driver().host_unregister(memory), "cuMemHostUnregister");
}

int32_t lss_cu_d2h_batch(int32_t device, void *stream, void *const *dst, const uint64_t *src, const size_t *nbytes,
                         int64_t num_copies) {
    const Entered entered(device);
    int32_t status = entered.status;
    for (int64_t i = 0; status == LSS_OK && i < num_copies; ++i) {
        if (nbytes[i] > 0) status = check(driver().d2h(dst[i], src[i], nbytes[i], stream), "cuMemcpyDtoHAsync");
    }
    return status;
}

int32_t lss_cu_h2d_batch(int32_t device, void *stream, const uint64_t *dst, const void *const *src,
                         const size_t *nbytes, int64_t num_copies) {
    const Entered entered(device);
    int32_t status = entered.status;
    for (int64_t i = 0; status == LSS_OK && i < num_copies; ++i) {
        if (nbytes[i] > 0) status = check(driver().h2d(dst[i], src[i], nbytes[i], stream), "cuMemcpyHtoDAsync");
    }
    return status;
}

int32_t lss_cu_event_record(int32_t device, void *event, void *stream) {
    const Entered entered(device);
    return entered.status != LSS_OK ? entered.status : check(driver().event_record(event, stream), "cuEventRecord");
}

int32_t lss_cu_stream_wait_event(int32_t device, void *stream, void *event) {
    const Entered entered(device);
    return entered.status != LSS_OK ? entered.status : check(driver().wait_event(stream, event, 0), "cuStreamWaitEvent");
}

int32_t lss_cu_launch_notify(int32_t device, void *stream, lss_ticket *ticket) {
    const Entered entered(device);
    if (entered.status != LSS_OK) return entered.status;
    lss_ticket_ref(ticket);  // dropped by lss_notify
    const int32_t status = check(driver().launch_host(stream, lss_notify, ticket), "cuLaunchHostFunc");
    if (status != LSS_OK) lss_ticket_free(ticket);
    return status;
}

}  // extern "C"
