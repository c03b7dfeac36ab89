// A store of two namespaces that nobody has open, and an engine that dies half-way.
#pragma once

#include <sys/stat.h>
#include <unistd.h>

#include "log_fixture.hpp"
#include "nvme/inspect.hpp"

namespace lmcn::nvme {

inline NamespaceId namespace_of(std::uint8_t byte) {
  NamespaceId ns;
  ns.bytes.fill(byte);
  return ns;
}

/// Ends every write and sync from the nth on with EIO, as if the process had died there.
class DyingEngine final : public io::IoEngine {
 public:
  DyingEngine(io::IoEngine& inner, std::uint64_t writes) : inner_(inner), left_(writes) {}
  void submit(std::span<const io::IoRequest> requests) override {
    for (const io::IoRequest& request : requests) {
      if (request.op != io::Op::kRead && (dead_ || left_-- == 0)) dead_ = true;
      if (request.op != io::Op::kRead && dead_) {
        request.sink->on_io({.tag = request.tag, .expected = request.bytes, .actual = 0, .error = EIO});
      } else {
        inner_.submit(std::span(&request, 1));
      }
    }
  }
  Status register_buffer(std::span<std::byte>) override { return {}; }
  Status register_fd(int) override { return {}; }
  void unregister_fd(int) override {}
  std::string name() const override { return "dying"; }
  bool died() const { return dead_; }

 private:
  io::IoEngine& inner_;
  std::uint64_t left_;
  bool dead_ = false;
};

class Inspect : public LogFixture {
 protected:
  static constexpr std::uint32_t kRecords = 60;  // 23 a region: two sealed, one open

  std::unique_ptr<StoreFiles> files(Access access = Access::kLook) { return files(access, *engine); }
  std::unique_ptr<StoreFiles> files(Access access, io::IoEngine& with) {
    auto opened = StoreFiles::open(options.directory, access, with);
    EXPECT_TRUE(opened.ok()) << opened.status().to_string();
    return opened.ok() ? std::move(opened).value() : nullptr;
  }
  Status refusal(Access access = Access::kLook) { return StoreFiles::open(options.directory, access, *engine).status(); }
  Inspection inspect(bool namespaces = false) {
    auto found = files()->inspect(namespaces);
    EXPECT_TRUE(found.ok()) << found.status().to_string();
    return std::move(found).value();
  }
  VerifyReport verify() {
    auto report = files()->verify(nullptr);
    EXPECT_TRUE(report.ok()) << report.status().to_string();
    return std::move(report).value();
  }
  Result<ClearReport> clear(const ClearRequest& request) { return files(Access::kChange)->clear(request); }

  /// Record `id`, in namespace `ns`.
  void put_in(std::uint32_t id, const NamespaceId& ns) {
    ids = std::max(ids, id + 1);
    PageBuffer image = make_image(id, 40 * kKiB);
    slot_header(image.data())->ns = ns;
    std::promise<Put> promise;
    const auto done = [&](const Status& status, Extent extent) { promise.set_value({status, extent}); };
    Status status = log->append(image.data(), image.bytes(), id, done);
    if (status.code() == Code::kResourceExhausted) {
      idle();
      ASSERT_TRUE(log->maintain().ok());
      idle();
      status = log->append(image.data(), image.bytes(), id, done);
    }
    ASSERT_TRUE(status.ok()) << status.to_string();
    const Put put = promise.get_future().get();
    ASSERT_TRUE(put.status.ok());
    index[id] = put.extent;
    truth[id].push_back(put.extent);
  }
  /// Every third record is of namespace 9, those of the second region all are.
  static bool is_nine(std::uint32_t id) { return id % 3 == 0 || (id >= 23 && id < 46); }
  void make_mixed_store(bool with_checkpoint) {
    open();
    for (std::uint32_t id = 0; id < kRecords; ++id) put_in(id, namespace_of(is_nine(id) ? 9 : 7));
    idle();
    if (with_checkpoint) {
      ASSERT_TRUE(checkpoint().ok());
    }
    kill();
  }
  Status read_in(Extent extent, std::uint32_t id) {
    PageBuffer image(extent.pages);
    std::promise<Status> done;
    const NamespaceId ns = namespace_of(is_nine(id) ? 9 : 7);
    log->read(extent, image.data(), key_of(id), &ns, [&](const Status& s) { done.set_value(s); });
    return done.get_future().get();
  }
  /// Opens; every record found reads well. Returns how many of namespace 9 and of others there are.
  std::pair<std::size_t, std::size_t> open_and_count() {
    open();
    std::pair<std::size_t, std::size_t> out;
    for (const auto& [id, extent] : index) {
      EXPECT_EQ(read_in(extent, id).to_string(), "ok") << id;
      ++(is_nine(id) ? out.first : out.second);
    }
    kill();
    return out;
  }
  using Snapshot = std::map<std::string, std::vector<char>>;
  Snapshot snapshot() const {
    Snapshot out;
    for (const auto& entry : std::filesystem::directory_iterator(options.directory)) {
      out[entry.path().filename()] = bytes_of(entry.path().filename().c_str());
    }
    return out;
  }
  void restore(const Snapshot& from) const {
    for (const auto& entry : std::filesystem::directory_iterator(options.directory)) std::filesystem::remove(entry.path());
    for (const auto& [name, bytes] : from) {
      write_file(name.c_str(), bytes);
      ASSERT_EQ(::chmod(file(name.c_str()).c_str(), 0600), 0);
    }
  }
};

}  // namespace lmcn::nvme
