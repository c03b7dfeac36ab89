#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <thread>

#include "log_fixture.hpp"

namespace lmcn::nvme {
namespace {

using StoreDirectory = LogFixture;

mode_t mode_of(const std::filesystem::path& path) {
  struct stat found{};
  EXPECT_EQ(::lstat(path.c_str(), &found), 0) << path;
  return found.st_mode & 07777;
}

TEST_F(StoreDirectory, IsMadePrivate) {
  options.directory = (root.path() / "a" / "b" / "store").string();
  open();
  ASSERT_TRUE(checkpoint().ok());
  EXPECT_EQ(mode_of(options.directory), 0700u);
  for (const char* name : {"LOCK", "superblock", "data.000", "index.ckpt"}) EXPECT_EQ(mode_of(file(name)), 0600u) << name;
}

TEST_F(StoreDirectory, LockedNamesThePid) {
  open();
  put_many(0, 3);
  LogOptions other = options;
  const auto second = RegionLog::open(other, *engine, *this);
  EXPECT_EQ(second.status().code(), Code::kLocked);
  EXPECT_NE(second.status().message().find("pid " + std::to_string(::getpid())), std::string::npos) << second.status().message();
  EXPECT_NE(second.status().message().find(options.directory), std::string::npos);
  expect_readable(0, 3);
}

TEST_F(StoreDirectory, WaitsForTheLock) {
  open();
  LogOptions other = options;
  other.lock_wait = std::chrono::seconds(60);
  std::promise<void> trying;
  std::jthread second([&] {
    trying.set_value();
    const auto opened = RegionLog::open(other, *engine, *this);
    EXPECT_TRUE(opened.ok()) << opened.status().to_string();
  });
  trying.get_future().wait();
  ASSERT_TRUE(close().ok());
}

TEST_F(StoreDirectory, SymbolicLinkIsRefused) {
  std::filesystem::create_directory(root.path() / "real");
  ASSERT_EQ(::chmod((root.path() / "real").c_str(), 0700), 0);
  std::filesystem::create_symlink(root.path() / "real", root.path() / "link");
  for (const char* name : {"link", "link/"}) {
    options.directory = (root.path() / name).string();
    const Status status = try_open();
    EXPECT_EQ(status.code(), Code::kInvalidArgument);
    EXPECT_NE(status.message().find("symbolic link"), std::string::npos) << status.message();
  }
  EXPECT_TRUE(std::filesystem::is_empty(root.path() / "real"));
}

TEST_F(StoreDirectory, OpenToOthersIsRefused) {
  std::filesystem::create_directory(options.directory);
  ASSERT_EQ(::chmod(options.directory.c_str(), 0755), 0);
  const Status status = try_open();
  EXPECT_EQ(status.code(), Code::kInvalidArgument);
  EXPECT_NE(status.message().find("0755"), std::string::npos) << status.message();
  EXPECT_NE(status.message().find("chmod 700"), std::string::npos) << status.message();
  EXPECT_TRUE(std::filesystem::is_empty(options.directory));
}

TEST_F(StoreDirectory, AnotherUsersIsRefused) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs root to give a directory away";
  std::filesystem::create_directory(options.directory);
  ASSERT_EQ(::chmod(options.directory.c_str(), 0700), 0);
  ASSERT_EQ(::chown(options.directory.c_str(), 12345, 12345), 0);
  const Status status = try_open();
  EXPECT_EQ(status.code(), Code::kInvalidArgument);
  EXPECT_NE(status.message().find("uid 12345"), std::string::npos) << status.message();
}

TEST_F(StoreDirectory, AFileIsRefused) {
  std::ofstream(options.directory) << "x";
  EXPECT_EQ(try_open().code(), Code::kInvalidArgument);
}

TEST_F(StoreDirectory, FilesThatAreLinksAreRefused) {
  open();
  ASSERT_TRUE(close().ok());
  std::filesystem::rename(file("data.000"), root.path() / "data");
  std::filesystem::create_symlink(root.path() / "data", file("data.000"));
  EXPECT_EQ(try_open().code(), Code::kInvalidArgument);
  std::filesystem::remove(file("data.000"));
  std::filesystem::create_hard_link(root.path() / "data", file("data.000"));
  EXPECT_EQ(try_open().code(), Code::kInvalidArgument);
}

TEST_F(StoreDirectory, LeftoversOfACrashAreRemoved) {
  open();
  put_many(0, 5);
  kill();
  write_file("index.ckpt.tmp", std::vector<char>(100'000));
  write_file("superblock.tmp", std::vector<char>(17));
  open();
  EXPECT_FALSE(std::filesystem::exists(file("index.ckpt.tmp")));
  EXPECT_FALSE(std::filesystem::exists(file("superblock.tmp")));
  expect_readable(0, 5);
}

}  // namespace
}  // namespace lmcn::nvme
