// Status and Result<T>: how every operation of the library reports failure. No exception crosses this API.
#pragma once

#include <cassert>
#include <optional>
#include <string>
#include <utility>

namespace lmcn {

enum class Code : unsigned char {
  kOk = 0,
  kInvalidArgument,    // the caller's value is wrong; the message names the field, the value and what would be right
  kNotFound,           // no such chunk, lease or job
  kResourceExhausted,  // a hard bound was reached (arena, NVMe limit, queue, budget)
  kUnavailable,        // a facility is missing here (CUDA, io_uring, a closed store)
  kDeadlineExceeded,   // the operation did not finish in its time
  kCorruption,         // bytes that are not provably the right ones
  kIoError,            // the device or file system failed; sys_errno says how
  kFormatVersion,      // on-disk format that this build does not know
  kLocked,             // another process owns the directory
  kAborted,            // the operation was withdrawn (lease dropped, store cleared, shutdown)
  kUnsupported,        // valid, but not implemented for this combination
  kInternal,           // a broken invariant of ours
};

/// "invalid_argument", "io_error", ... (stable; used in logs, metrics and Python exceptions)
const char* code_name(Code code) noexcept;

/// Value type, cheap when ok. Thread-compatible.
class [[nodiscard]] Status {
 public:
  Status() noexcept = default;
  Status(Code code, std::string message, int sys_errno = 0) : code_(code), sys_errno_(sys_errno), message_(std::move(message)) {}

  /// An I/O failure: `what` plus the text of `sys_errno`.
  static Status from_errno(int sys_errno, std::string what, Code code = Code::kIoError);

  bool ok() const noexcept { return code_ == Code::kOk; }
  Code code() const noexcept { return code_; }
  int sys_errno() const noexcept { return sys_errno_; }
  const std::string& message() const noexcept { return message_; }
  /// "io_error: pwrite /x/data.000: No space left on device (28)"
  std::string to_string() const;

 private:
  Code code_ = Code::kOk;
  int sys_errno_ = 0;
  std::string message_;
};

/// Either a T or a failed Status.
template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) : value_(std::move(value)) {}                                  // NOLINT(google-explicit-constructor)
  Result(Status status) : status_(std::move(status)) { assert(!status_.ok()); }  // NOLINT(google-explicit-constructor)

  bool ok() const noexcept { return value_.has_value(); }
  const Status& status() const noexcept { return status_; }
  /// REQUIRES: ok()
  T& value() & {
    assert(ok());
    return *value_;
  }
  const T& value() const& {
    assert(ok());
    return *value_;
  }
  T&& value() && {
    assert(ok());
    return std::move(*value_);
  }
  T& operator*() & { return value(); }
  const T& operator*() const& { return value(); }
  T* operator->() { return &value(); }
  const T* operator->() const { return &value(); }

 private:
  std::optional<T> value_;
  Status status_;
};

#define LMCN_CONCAT_INNER_(a, b) a##b
#define LMCN_CONCAT_(a, b) LMCN_CONCAT_INNER_(a, b)
/// Returns from the enclosing function when `expr` (a Status) is not ok.
#define LMCN_RETURN_IF_ERROR(expr)                                      \
  do {                                                                  \
    if (::lmcn::Status lmcn_s_ = (expr); !lmcn_s_.ok()) return lmcn_s_; \
  } while (false)

}  // namespace lmcn
