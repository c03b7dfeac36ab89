// Numbers in files that hold but cannot be, and things that are no files: refused by name before anything is reserved for them.
#include "inspect_fixture.hpp"

namespace lmcn::nvme {
namespace {

using Bounds = Inspect;

TEST_F(Bounds, ACheckpointOfMoreThanThereCanBeIsNotUsed) {
  open();
  put_many(0, 3);
  ASSERT_TRUE(close().ok());
  const std::vector<char> good = bytes_of("index.ckpt");
  CheckpointHeader header;
  std::memcpy(static_cast<void*>(&header), good.data(), sizeof header);
  const auto with = [&](std::uint32_t regions, std::uint64_t entries) {
    header.region_count = regions;
    header.entry_count = entries;
    seal_page(header);
    const auto* bytes = reinterpret_cast<const char*>(&header);
    write_file("index.ckpt", {bytes, bytes + sizeof header});
    const std::uint64_t length = sizeof header + regions * sizeof(CheckpointRegion) + entries * sizeof(CheckpointEntry);
    ASSERT_EQ(::truncate(file("index.ckpt").c_str(), static_cast<off_t>(length)), 0);
    EXPECT_NE(inspect().checkpoint_note.find("more regions or records"), std::string::npos) << inspect().checkpoint_note;
    open();
    EXPECT_EQ(index.size(), 3u);
    kill();
  };
  with(0, std::uint64_t{1} << 36);
  with(7, 7 * 128 + 1);
  with(UINT32_MAX, 0);
  write_file("index.ckpt", {good.begin(), good.begin() + 4095});
  EXPECT_NE(inspect().checkpoint_note.find("length"), std::string::npos) << inspect().checkpoint_note;
}

TEST_F(Bounds, RegionBytesOfASuperblock) {
  open();
  put_many(0, 3);
  ASSERT_TRUE(close().ok());
  const std::vector<char> good = bytes_of("superblock");
  const Snapshot before = snapshot();
  for (const std::uint64_t bytes : {std::uint64_t{0}, std::uint64_t{1} << 62, (std::uint64_t{1} << 20) + 1, std::uint64_t{1} << 63,
                                    (std::uint64_t{1} << 43) + 4096}) {
    Superblock superblock;
    std::memcpy(static_cast<void*>(&superblock), good.data(), sizeof superblock);
    superblock.region_bytes = bytes;
    seal_page(superblock);
    const auto* page = reinterpret_cast<const char*>(&superblock);
    write_file("superblock", {page, page + sizeof superblock});
    for (const Status& status : {try_open(), refusal()}) {
      EXPECT_EQ(status.code(), Code::kCorruption) << bytes;
      EXPECT_NE(status.message().find("region_bytes=" + std::to_string(bytes)), std::string::npos) << status.to_string();
    }
  }
  write_file("superblock", good);
  Snapshot after = snapshot();
  before.at("LOCK") == after.at("LOCK") ? void() : void(after["LOCK"] = before.at("LOCK"));
  EXPECT_EQ(after, before);
}

TEST_F(Bounds, ADataFileOfMoreRegionsThanThereCanBe) {
  TemporaryDirectory on_tmpfs("/dev/shm");  // files there may be as long as this
  options.directory = (on_tmpfs.path() / "store").string();
  open();
  put_many(0, 3);
  ASSERT_TRUE(close().ok());
  const std::uint64_t length = (std::uint64_t{1} << 29) * options.region_bytes;
  ASSERT_EQ(::truncate(file("data.000").c_str(), static_cast<off_t>(length)), 0) << errno;
  EXPECT_EQ(try_open().code(), Code::kCorruption);
  EXPECT_EQ(files()->inspect(false).status().code(), Code::kCorruption);
}

TEST_F(Bounds, AFifoInPlaceOfAFileIsRefusedAtOnce) {
  open();
  put_many(0, 3);
  ASSERT_TRUE(close().ok());
  std::filesystem::remove(file("index.ckpt"));
  ASSERT_EQ(::mkfifo(file("index.ckpt").c_str(), 0600), 0);
  auto contents = std::async(std::launch::async, [&] { return files()->inspect(false).status().to_string(); });
  EXPECT_NE(contents.get().find("regular file"), std::string::npos);
  open();
  EXPECT_EQ(index.size(), 3u);
}

TEST_F(Bounds, LookingLeavesModesAsTheyAre) {
  open();
  put_many(0, 3);
  ASSERT_TRUE(close().ok());
  const char* const names[] = {"LOCK", "superblock", "data.000", "index.ckpt"};
  for (const char* name : names) ASSERT_EQ(::chmod(file(name).c_str(), 0640), 0);
  EXPECT_EQ(inspect(true).live.records, 3u);
  EXPECT_TRUE(verify().bad.empty());
  for (const char* name : names) {
    struct stat found{};
    ASSERT_EQ(::stat(file(name).c_str(), &found), 0);
    EXPECT_EQ(found.st_mode & 07777, 0640u) << name;
  }
}

}  // namespace
}  // namespace lmcn::nvme
