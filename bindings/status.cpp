#include "status.hpp"

#include <nanobind/nanobind.h>

#include <array>

#include "bindings.hpp"

namespace lmcn::python {
namespace {

constexpr std::array<std::pair<Code, const char*>, 12> kClasses{{
    {Code::kInvalidArgument, "InvalidArgument"},
    {Code::kNotFound, "NotFound"},
    {Code::kResourceExhausted, "ResourceExhausted"},
    {Code::kUnavailable, "Unavailable"},
    {Code::kDeadlineExceeded, "DeadlineExceeded"},
    {Code::kCorruption, "Corruption"},
    {Code::kIoError, "IoError"},
    {Code::kFormatVersion, "FormatVersion"},
    {Code::kLocked, "Locked"},
    {Code::kAborted, "Aborted"},
    {Code::kUnsupported, "Unsupported"},
    {Code::kInternal, "InternalError"},
}};

// By code; one reference each for the life of the process.
std::array<PyObject*, kClasses.size() + 1> exception_classes{};
PyObject* cuda_unavailable = nullptr;

void raise(PyObject* cls, const Status& status) {
  nb::object value = nb::handle(cls)(status.message(), nb::arg("sys_errno") = status.sys_errno());
  PyErr_SetObject(cls, value.ptr());
}

}  // namespace

void init_status(nb::module_&) {
  nb::object errors = nb::module_::import_("lmcache_native.errors");
  for (const auto& [code, name] : kClasses) {
    exception_classes.at(static_cast<std::size_t>(code)) = nb::object(errors.attr(name)).release().ptr();
  }
  cuda_unavailable = nb::object(errors.attr("CudaUnavailable")).release().ptr();
  nb::register_exception_translator([](const std::exception_ptr& pointer, void*) {
    try {
      std::rethrow_exception(pointer);
    } catch (const CudaUnavailableError& error) {
      raise(cuda_unavailable, error.status());
    } catch (const StatusError& error) {
      raise(exception_classes.at(static_cast<std::size_t>(error.status().code())), error.status());
    }
  });
}

}  // namespace lmcn::python
