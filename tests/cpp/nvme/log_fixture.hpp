// A store directory of its own, a faulty engine, and the caller's index: each test says what it writes, breaks and expects.
#pragma once

#include <gtest/gtest.h>
#include <stdlib.h>

#include <cstring>
#include <deque>
#include <filesystem>
#include <fstream>
#include <future>
#include <map>
#include <set>
#include <vector>

#include "io/faulty_engine.hpp"
#include "nvme/log.hpp"
#include "split_mix.hpp"

namespace lmcn::nvme {

inline constexpr std::uint64_t kKiB = 1024, kMiB = 1024 * kKiB;

using Random = SplitMix;

inline ChunkKey key_of(std::uint32_t id) {
  ChunkKey key;
  Random random(id);
  for (std::size_t i = 0; i < 32; i += 8) {
    const std::uint64_t word = random();
    std::memcpy(&key.bytes[i], &word, 8);
  }
  return key;
}

inline NamespaceId test_namespace() {
  NamespaceId ns;
  ns.bytes.fill(7);
  return ns;
}

inline const NamespaceId kTestNamespace = test_namespace();

inline void fill_payload(std::byte* payload, std::uint64_t bytes, std::uint32_t id) {
  Random random(id * 7919ull + bytes);
  for (std::uint64_t i = 0; i < bytes; i += 8) {
    const std::uint64_t word = random();
    std::memcpy(payload + i, &word, std::min<std::uint64_t>(8, bytes - i));
  }
}

inline PageBuffer make_image(std::uint32_t id, std::uint64_t payload_bytes) {
  PageBuffer image(image_bytes(payload_bytes) / kPageBytes);
  begin_slot(image.data(), key_of(id), test_namespace(), payload_bytes, 1, 1);
  fill_payload(image.data() + kPageBytes, payload_bytes, id);
  return image;
}

/// Ok only for exactly the payload that put(id, ...) wrote.
inline Status check_payload(const std::byte* image, std::uint32_t id) {
  const std::uint64_t bytes = slot_header(image)->payload_bytes;
  std::vector<std::byte> expected(bytes);
  fill_payload(expected.data(), bytes, id);
  if (std::memcmp(image + kPageBytes, expected.data(), bytes) == 0) return {};
  return {Code::kInternal, "a read that was ok has wrong bytes (id " + std::to_string(id) + ")"};
}

inline std::unique_ptr<io::IoEngine> real_engine(io::EngineKind kind) {
  auto engine = io::make_engine({.kind = kind, .queue_depth = 16, .threads = 4});
  return engine.ok() ? std::move(engine).value() : nullptr;
}

class TemporaryDirectory {
 public:
  TemporaryDirectory() : TemporaryDirectory(std::filesystem::temp_directory_path()) {}
  explicit TemporaryDirectory(const std::filesystem::path& parent) {
    std::string name = (parent / "lmcn_nvme_XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) throw std::runtime_error("mkdtemp " + name);
    path_ = name;
  }
  ~TemporaryDirectory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  std::filesystem::path path() const { return path_; }

 private:
  std::filesystem::path path_;
};

class LogFixture : public testing::Test, public LogClient {
 protected:
  LogFixture() { use_engine(io::EngineKind::kThreads); }
  ~LogFixture() override { kill(); }

  void use_engine(io::EngineKind kind) {
    auto inner = real_engine(kind);
    ASSERT_NE(inner, nullptr);
    engine = std::make_unique<io::FaultyEngine>(std::move(inner));
  }

  static LogOptions small_options(const std::string& directory) {
    LogOptions options;
    options.directory = directory;
    options.limit_bytes = 8 * kMiB;  // 7 regions
    options.region_bytes = 1 * kMiB;
    options.max_record_bytes = 256 * kKiB;
    options.lock_wait = std::chrono::milliseconds(0);
    options.free_space_floor_bytes = 0;
    options.sync_interval = std::chrono::milliseconds(0);
    return options;
  }

  Status try_open() {
    auto opened = RegionLog::open(options, *engine, *this);
    if (!opened.ok()) return opened.status();
    log = std::move(opened).value();
    index.clear();
    recovered.clear();
    log->adopt([this](const RecoveredRecord& record) {
      recovered.push_back(record);
      const std::uint32_t id = id_of(record.key);
      EXPECT_LT(id, ids) << "recovered a key that was never written";
      if (const auto known = index.find(id); known != index.end()) log->forget(known->second);
      index[id] = record.extent;
      return id;
    });
    return {};
  }
  void open() {
    const Status status = try_open();
    ASSERT_TRUE(status.ok()) << status.to_string();
  }
  /// As if the process died: no footer, no checkpoint.
  void kill() {
    if (log) idle();
    log.reset();
  }
  Status close() {
    const Status status = log->close(entries());
    log.reset();
    return status;
  }
  void reopen() {
    const Status status = close();
    ASSERT_TRUE(status.ok()) << status.to_string();
    open();
  }
  void kill_and_open() {
    kill();
    open();
  }

  /// `ids`: none of ours.
  std::uint32_t id_of(const ChunkKey& key) {
    while (known_ids.size() < ids) {
      const auto id = static_cast<std::uint32_t>(known_ids.size());
      known_ids[key_of(id)] = id;
    }
    const auto found = known_ids.find(key);
    return found == known_ids.end() ? ids : found->second;
  }

  RegionLog::EntrySource entries() {
    return [this](const RegionLog::EntrySink& sink) {
      for (const auto& [id, extent] : index) sink(key_of(id), extent);
    };
  }
  Status checkpoint() { return log->checkpoint(entries()); }
  void idle() { static_cast<Log&>(*log).wait_idle(); }

  struct Put {
    Status status;
    Extent extent;
  };
  /// Appends and does not wait; the future is ready when `done` ran. A refused append has its status there too.
  std::future<Put> start_put(std::uint32_t id, std::uint64_t payload_bytes = 40 * kKiB) {
    ids = std::max(ids, id + 1);
    images.push_back(make_image(id, payload_bytes));
    auto promise = std::make_shared<std::promise<Put>>();
    PageBuffer& image = images.back();
    const auto append = [&] {
      return log->append(image.data(), image.bytes(), id,
                         [promise](const Status& status, Extent extent) { promise->set_value({status, extent}); });
    };
    Status status = append();
    if (status.code() == Code::kResourceExhausted) {
      idle();
      if (log->maintain().ok()) idle();
      status = append();
    }
    if (!status.ok()) promise->set_value({status, {}});
    return promise->get_future();
  }
  Status put(std::uint32_t id, std::uint64_t payload_bytes = 40 * kKiB) {
    const Put result = start_put(id, payload_bytes).get();
    images.clear();
    if (result.status.ok()) {
      index[id] = result.extent;
      truth[id].push_back(result.extent);
    }
    return result.status;
  }
  void put_many(std::uint32_t begin, std::uint32_t end, std::uint64_t payload_bytes = 40 * kKiB) {
    for (std::uint32_t id = begin; id < end; ++id) {
      const Status status = put(id, payload_bytes);
      ASSERT_TRUE(status.ok()) << id << ": " << status.to_string();
    }
  }

  Status read(Extent extent, std::uint32_t id) {
    PageBuffer image(std::max(extent.pages, 1u));
    std::promise<Status> done;
    log->read(extent, image.data(), key_of(id), &kTestNamespace, [&](const Status& status) { done.set_value(status); });
    Status status = done.get_future().get();
    return status.ok() ? check_payload(image.data(), id) : status;
  }
  Status get(std::uint32_t id) {
    const auto found = index.find(id);
    return found == index.end() ? Status(Code::kNotFound, "miss") : read(found->second, id);
  }
  void expect_readable(std::uint32_t begin, std::uint32_t end) {
    for (std::uint32_t id = begin; id < end; ++id) EXPECT_EQ(get(id).to_string(), "ok") << id;
  }
  /// What was recovered is true: each record is one that was written, where it was written, and reads as it was written.
  void expect_no_lies() {
    for (const RecoveredRecord& record : recovered) {
      const std::uint32_t id = id_of(record.key);
      const auto& extents = truth[id];
      EXPECT_NE(std::find(extents.begin(), extents.end(), record.extent), extents.end()) << "wrong extent for " << id;
      EXPECT_EQ(read(record.extent, id).to_string(), "ok") << id;
    }
  }

  bool evacuated(std::uint32_t, std::span<const std::uint32_t>) override { return evacuates_at_once; }
  void on_reclaim(std::uint32_t region, std::span<const std::uint32_t> cookies) override {
    reclaims.push_back({region, {cookies.begin(), cookies.end()}});
    for (const std::uint32_t id : cookies) {
      if (const auto found = index.find(id); found != index.end() && found->second.region == region) index.erase(found);
    }
  }

  std::filesystem::path file(const char* name) const { return std::filesystem::path(options.directory) / name; }
  std::vector<char> bytes_of(const char* name) const {
    std::ifstream in(file(name), std::ios::binary);
    return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
  }
  void write_file(const char* name, const std::vector<char>& bytes) const {
    std::ofstream out(file(name), std::ios::binary | std::ios::trunc);
    out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    ASSERT_TRUE(out.good());
  }
  void write_bytes(const char* name, std::uint64_t offset, const std::vector<char>& bytes) const {
    std::fstream stream(file(name), std::ios::binary | std::ios::in | std::ios::out);
    stream.seekp(static_cast<std::streamoff>(offset));
    stream.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    ASSERT_TRUE(stream.good());
  }
  void flip_byte(const char* name, std::uint64_t offset) const {
    std::fstream stream(file(name), std::ios::binary | std::ios::in | std::ios::out);
    stream.seekg(static_cast<std::streamoff>(offset));
    const int byte = stream.get();
    stream.seekp(static_cast<std::streamoff>(offset));
    stream.put(static_cast<char>(byte ^ 0x20));
    ASSERT_TRUE(stream.good());
  }

  struct Reclaim {
    std::uint32_t region;
    std::vector<std::uint32_t> cookies;
  };

  TemporaryDirectory root;
  LogOptions options = small_options((root.path() / "store").string());
  std::unique_ptr<io::FaultyEngine> engine;
  std::deque<PageBuffer> images;  // of appends under way; before the log, whose I/O reads them
  std::unique_ptr<RegionLog> log;
  std::uint32_t ids = 0;
  std::map<ChunkKey, std::uint32_t> known_ids;
  std::map<std::uint32_t, Extent> index;               // the caller's
  std::map<std::uint32_t, std::vector<Extent>> truth;  // every extent that was ever acknowledged
  std::vector<RecoveredRecord> recovered;              // by the last open
  std::vector<Reclaim> reclaims;
  bool evacuates_at_once = true;
};

}  // namespace lmcn::nvme
