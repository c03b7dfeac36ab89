// Failed Status -> typed Python exception.
#pragma once

#include <exception>
#include <string>
#include <utility>

#include "lmcn/status.hpp"

namespace lmcn::python {

/// Thrown by the bindings only; becomes the class of lmcache_native.errors that belongs to the code.
class StatusError : public std::exception {
 public:
  explicit StatusError(Status status) : status_(std::move(status)) {}
  const Status& status() const noexcept { return status_; }
  const char* what() const noexcept override { return status_.message().c_str(); }

 private:
  Status status_;
};

/// kUnavailable because of CUDA: becomes CudaUnavailable.
class CudaUnavailableError : public StatusError {
 public:
  using StatusError::StatusError;
};

[[noreturn]] inline void throw_invalid(std::string message) {
  throw StatusError(Status(Code::kInvalidArgument, std::move(message)));
}

inline void throw_if_error(Status status) {
  if (!status.ok()) throw StatusError(std::move(status));
}

template <class T>
T take(Result<T> result) {
  if (!result.ok()) throw StatusError(result.status());
  return std::move(result).value();
}

/// take() of what needs CUDA.
template <class T>
T take_cuda(Result<T> result) {
  if (!result.ok() && result.status().code() == Code::kUnavailable) throw CudaUnavailableError(result.status());
  return take(std::move(result));
}

}  // namespace lmcn::python
