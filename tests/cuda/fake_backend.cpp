#include <cstring>

#include "copier_suite.hpp"
#include "fake_cudart.hpp"
#include "host_registration.hpp"

namespace lmcn::copier_suite {
namespace {

// Device 1, so that a missing cudaSetDevice shows.
class FakeCudaBackend final : public Backend {
 public:
  ~FakeCudaBackend() override { release_all(); }
  std::byte* allocate(std::size_t bytes) override {
    memory_.push_back(fake_cuda::allocate(bytes, 1));
    return memory_.back();
  }
  void release_all() override {
    for (std::byte* memory : memory_) fake_cuda::release(memory);
    memory_.clear();
  }
  std::byte* allocate_arena(std::size_t bytes) override { return fake_cuda::allocate_host(bytes); }
  void release_arena(std::byte* arena) override { fake_cuda::release_host(arena); }
  void upload(std::byte* to, const std::byte* from, std::size_t bytes) override { std::memcpy(to, from, bytes); }
  void download(std::byte* to, const std::byte* from, std::size_t bytes) override { std::memcpy(to, from, bytes); }
  void synchronize() override { fake_cuda::synchronize(nullptr, 1); }
  Result<std::unique_ptr<PagedCopier>> make(const PagedKvLayout& paged, const SlotLayout& slot, std::byte* arena,
                                            std::uint64_t arena_bytes, const CopierOptions& options) override {
    auto made = make_cuda_copier(paged, slot, arena, arena_bytes, options, 1);
    if (!made.ok()) return made;
    // Which path a slot takes, and whose calls a test makes fail, must not depend on how far the registration is.
    const Status ended = HostRegistration::of(arena, arena_bytes, 1)->wait_ended(std::chrono::minutes(1));
    if (!ended.ok()) return ended;
    return made;
  }

 private:
  std::vector<std::byte*> memory_;
};

}  // namespace

std::unique_ptr<Backend> make_backend() {
  return std::make_unique<FakeCudaBackend>();
}

}  // namespace lmcn::copier_suite
