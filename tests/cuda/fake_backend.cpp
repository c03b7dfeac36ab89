#include "fake_device.hpp"
#include "host_registration.hpp"
#include "measurement.hpp"

namespace lmcn::copier_suite {
namespace {

// Device 1, so that a missing cudaSetDevice shows.
class FakeCudaBackend final : public FakeDeviceBackend {
 public:
  FakeCudaBackend() : FakeDeviceBackend(1) {}
  std::byte* allocate_arena(std::size_t bytes) override { return fake_cuda::allocate_host(bytes); }
  void release_arena(std::byte* arena) override { fake_cuda::release_host(arena); }
  void synchronize() override { fake_cuda::synchronize(nullptr, 1); }
  Result<std::unique_ptr<PagedCopier>> make(const PagedKvLayout& paged, const SlotLayout& slot, std::byte* arena,
                                            std::uint64_t arena_bytes, const CopierOptions& options) override {
    Measurement::forget_all();
    if (const Result<bool> ready = prepare_cuda_copier(paged, slot, 1, std::chrono::minutes(1)); !ready.ok()) return ready.status();
    auto made = make_cuda_copier(paged, slot, arena, arena_bytes, options, 1);
    if (!made.ok()) return made;
    // Which path a slot takes, and whose calls a test makes fail, must not depend on how far the registration is.
    const Status ended = HostRegistration::of(arena, arena_bytes, 1)->wait_ended(std::chrono::minutes(1));
    if (!ended.ok()) return ended;
    return made;
  }
};

}  // namespace

std::unique_ptr<Backend> make_backend() {
  return std::make_unique<FakeCudaBackend>();
}

}  // namespace lmcn::copier_suite
