#include "lmcn/attach.hpp"

#include <nanobind/nanobind.h>

#include "arguments.hpp"
#include "bindings.hpp"
#include "status.hpp"

namespace lmcn::python {

const std::shared_ptr<ArenaAttachment>& AttachmentObject::get() const {
  if (attachment == nullptr) throw StatusError(Status(Code::kUnavailable, "the arena attachment is closed"));
  return attachment;
}

namespace {

AttachmentObject attach(const std::string& engine_id, std::uint32_t rank, std::uint64_t rank_bytes, double timeout_s,
                        bool replicated) {
  const auto deadline = milliseconds(timeout_s, "timeout_s");
  auto attached = [&] {
    nb::gil_scoped_release release;
    return ArenaAttachment::attach(engine_id, rank, rank_bytes, deadline, replicated);
  }();
  return {std::shared_ptr<ArenaAttachment>(take(std::move(attached)))};
}

}  // namespace

void init_attach(nb::module_& module) {
  nb::class_<AttachmentObject>(module, "ArenaAttachment",
                               "The arena of the process that owns the store, mapped in this worker. Dropping it (and every copier "
                               "made with it) unmaps it and tells\n"
                               "the owner that the rank is gone.")
      .def_static("attach", attach, nb::arg("engine_id"), nb::arg("rank"), nb::arg("rank_bytes"), nb::arg("timeout_s") = 30.0,
                  nb::arg("replicated") = false,
                  "Waits at most timeout_s for an owner that serves engine_id, without the GIL. rank_bytes: one rank's part of a "
                  "slot, and replicated:\n"
                  "whether all ranks share it; both are checked against the owner's. DeadlineExceeded names the socket path; "
                  "InvalidArgument names both values that differ.")
      .def(
          "close", [](AttachmentObject& self) { self.attachment.reset(); },
          "Gives up this reference; copiers keep theirs. Idempotent.")
      .def_prop_ro(
          "bytes", [](const AttachmentObject& self) { return self.get()->bytes(); }, "Size of the arena.")
      .def_prop_ro("owner_pid", [](const AttachmentObject& self) { return self.get()->owner_pid(); });
}

}  // namespace lmcn::python
