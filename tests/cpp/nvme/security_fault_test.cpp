// Who else may reach a store's files: nobody, and nothing outside the directory is reached through them.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "log_fixture.hpp"

namespace lmcn::nvme {
namespace {

constexpr const char* kFiles[] = {"LOCK", "superblock", "data.000", "index.ckpt"};
constexpr const char* kLeftovers[] = {"superblock.tmp", "index.ckpt.tmp"};

class StoreSecurity : public LogFixture {
 protected:
  static mode_t mode_of(const std::filesystem::path& path) {
    struct stat found{};
    EXPECT_EQ(::lstat(path.c_str(), &found), 0) << path;
    return found.st_mode & 07777;
  }
  /// A whole store with every file in it.
  void make_store() {
    open();
    put_many(0, 3);
    ASSERT_TRUE(close().ok());
    for (const char* name : kFiles) ASSERT_TRUE(std::filesystem::exists(file(name))) << name;
  }
  std::vector<char> outside() const {
    std::ifstream in(root.path() / "outside", std::ios::binary);
    return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
  }
};

class ScopedUmask {
 public:
  explicit ScopedUmask(mode_t mask) : before_(::umask(mask)) {}
  ~ScopedUmask() { ::umask(before_); }
  ScopedUmask(const ScopedUmask&) = delete;
  ScopedUmask& operator=(const ScopedUmask&) = delete;

 private:
  mode_t before_;
};

TEST_F(StoreSecurity, ModesDoNotDependOnTheUmask) {
  int run = 0;
  for (const mode_t mask : {0u, 022u, 077u, 0277u, 0777u}) {
    const std::filesystem::path top = root.path() / std::to_string(run++);
    options.directory = (top / "below" / "store").string();
    {
      const ScopedUmask scope(mask);
      make_store();
    }
    for (const auto& path : {top, top / "below", top / "below" / "store"})
      EXPECT_EQ(mode_of(path), 0700u) << path << std::oct << mask;
    for (const char* name : kFiles) EXPECT_EQ(mode_of(file(name)), 0600u) << name << std::oct << mask;
    std::filesystem::remove_all(top);
  }
}

TEST_F(StoreSecurity, FilesThatWereOpenedToOthersAreClosedAgain) {
  make_store();
  for (const char* name : kFiles) ASSERT_EQ(::chmod(file(name).c_str(), 0666), 0);
  open();
  for (const char* name : kFiles) EXPECT_EQ(mode_of(file(name)), 0600u) << name;
  expect_readable(0, 3);
}

TEST_F(StoreSecurity, NoLinkOfEitherKindIsFollowed) {
  for (const bool hard : {false, true}) {
    for (const char* name : kFiles) {
      std::filesystem::remove_all(options.directory);
      make_store();
      std::filesystem::rename(file(name), root.path() / "outside");
      const std::vector<char> before = outside();
      if (hard) {
        std::filesystem::create_hard_link(root.path() / "outside", file(name));
      } else {
        std::filesystem::create_symlink(root.path() / "outside", file(name));
      }
      const Status opened = try_open();
      if (std::string(name) == "index.ckpt") {  // can be done without; the next one takes the link's place
        ASSERT_TRUE(opened.ok()) << opened.to_string();
        EXPECT_EQ(log->stats().recovered_from_checkpoint, 0u);
        EXPECT_EQ(recovered.size(), 3u);
        put_many(3, 6);
        ASSERT_TRUE(close().ok());
        EXPECT_TRUE(std::filesystem::is_regular_file(std::filesystem::symlink_status(file(name))));
      } else {
        EXPECT_EQ(opened.code(), Code::kInvalidArgument) << name << ": " << opened.to_string();
        EXPECT_NE(opened.message().find(name), std::string::npos) << opened.message();
      }
      EXPECT_EQ(outside(), before) << name;
      std::filesystem::remove(root.path() / "outside");
    }
  }
}

TEST_F(StoreSecurity, LinksInThePlaceOfTemporaryFilesAreRemovedNotWritten) {
  for (const char* name : kLeftovers) {
    std::filesystem::remove_all(options.directory);
    make_store();
    write_file("../outside", std::vector<char>(10, 'x'));
    std::filesystem::create_symlink(root.path() / "outside", file(name));
    open();
    put_many(3, 5);
    std::filesystem::remove(file(name));
    std::filesystem::create_symlink(root.path() / "outside", file(name));  // and while it is open
    ASSERT_TRUE(checkpoint().ok());
    ASSERT_TRUE(log->clear().ok());
    EXPECT_EQ(outside(), std::vector<char>(10, 'x')) << name;
    EXPECT_FALSE(std::filesystem::exists(std::filesystem::symlink_status(file(name)))) << name;
    kill();
  }
}

TEST_F(StoreSecurity, AnotherUsersFilesAreRefused) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs root to give files away";
  for (const char* name : {"LOCK", "superblock", "data.000"}) {
    std::filesystem::remove_all(options.directory);
    make_store();
    ASSERT_EQ(::chown(file(name).c_str(), 12345, 12345), 0);
    const Status opened = try_open();
    EXPECT_EQ(opened.code(), Code::kInvalidArgument) << name;
    EXPECT_NE(opened.message().find("owned by uid 0"), std::string::npos) << opened.message();
  }
}

// While the store is open its directory is its own whatever becomes of the path.
TEST_F(StoreSecurity, ADirectoryThatIsSwappedUnderUsIsNotWrittenTo) {
  open();
  put_many(0, 3);
  std::filesystem::rename(options.directory, root.path() / "moved");
  std::filesystem::create_directory(options.directory);
  ASSERT_TRUE(checkpoint().ok());
  put_many(3, 5);
  ASSERT_TRUE(close().ok());
  EXPECT_TRUE(std::filesystem::is_empty(options.directory));
  std::filesystem::remove(options.directory);
  std::filesystem::rename(root.path() / "moved", options.directory);
  open();
  expect_readable(0, 5);
}

}  // namespace
}  // namespace lmcn::nvme
