// The calling thread's last error text, behind lss_last_error().
#pragma once
#include <cstdint>

namespace lss {
// Records a printf-style text and returns `status`, so that callers can `return fail(...)`.
int32_t fail(int32_t status, const char *format, ...) __attribute__((format(printf, 2, 3)));
}  // namespace lss
