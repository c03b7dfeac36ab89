#include <fcntl.h>
#include <sys/un.h>

#include "attach_fixture.hpp"

namespace lmcn {
namespace {

namespace fs = std::filesystem;

mode_t mode_of(const std::string& path) {
  struct stat status{};
  return ::lstat(path.c_str(), &status) == 0 ? status.st_mode & 07777 : 0;
}

class RuntimeDirectory : public ::testing::Test {
 protected:
  Result<std::string> with_override(const std::string& value) {
    const ScopedEnv environment("LMCN_RUNTIME_DIR", value);
    return runtime_directory();
  }
  void refuses(const std::string& value, const std::string& part_of_message) {
    const auto directory = with_override(value);
    ASSERT_FALSE(directory.ok()) << value;
    EXPECT_EQ(directory.status().code(), Code::kInvalidArgument);
    EXPECT_NE(directory.status().message().find(part_of_message), std::string::npos) << directory.status().message();
    EXPECT_NE(directory.status().message().find(value), std::string::npos) << directory.status().message();
  }
  ScratchDirectory scratch_;
};

TEST_F(RuntimeDirectory, OverrideIsMadePrivate) {
  const std::string wanted = scratch_.path() + "/mine";
  const auto directory = with_override(wanted);
  ASSERT_TRUE(directory.ok()) << directory.status().to_string();
  EXPECT_EQ(*directory, wanted);
  EXPECT_EQ(mode_of(wanted), 0700u);
  EXPECT_TRUE(with_override(wanted).ok()) << "a second time";
  EXPECT_EQ(*with_override(wanted + "//"), wanted);
}

TEST_F(RuntimeDirectory, XdgBaseWhereItIsADirectoryOfOursElseTmp) {
  const ScopedEnv no_override("LMCN_RUNTIME_DIR", std::nullopt);
  const std::string name = "/lmcache-native-" + std::to_string(::geteuid());
  {
    const ScopedEnv xdg("XDG_RUNTIME_DIR", scratch_.path());
    EXPECT_EQ(*runtime_directory(), scratch_.path() + name);
    EXPECT_EQ(mode_of(scratch_.path() + name), 0700u);
  }
  for (const std::optional<std::string>& value : {std::optional<std::string>(scratch_.path() + "/absent"),
                                                  std::optional<std::string>("relative"), std::optional<std::string>("")}) {
    const ScopedEnv xdg("XDG_RUNTIME_DIR", value);
    const bool was_there = fs::exists("/tmp" + name);
    EXPECT_EQ(*runtime_directory(), "/tmp" + name);
    if (!was_there) fs::remove("/tmp" + name);
  }
}

TEST_F(RuntimeDirectory, WideModeIsRefused) {
  const std::string wide = scratch_.path() + "/wide";
  fs::create_directory(wide);
  for (const unsigned mode : {0755u, 0710u, 0701u, 0777u}) {
    ASSERT_EQ(::chmod(wide.c_str(), static_cast<mode_t>(mode)), 0);
    refuses(wide, "must be 0700");
  }
  ASSERT_EQ(::chmod(wide.c_str(), 0700), 0);
  EXPECT_TRUE(with_override(wide).ok());
}

TEST_F(RuntimeDirectory, SymlinkIsRefused) {
  fs::create_directory(scratch_.path() + "/real");
  fs::permissions(scratch_.path() + "/real", fs::perms::owner_all);
  fs::create_symlink(scratch_.path() + "/real", scratch_.path() + "/link");
  refuses(scratch_.path() + "/link", "symlink");
  EXPECT_FALSE(with_override(scratch_.path() + "/link/").ok()) << "a slash at the end must not follow it";
  fs::create_symlink(scratch_.path() + "/nowhere", scratch_.path() + "/dangling");
  refuses(scratch_.path() + "/dangling", "symlink");
}

TEST_F(RuntimeDirectory, OtherThingsAreRefused) {
  std::fclose(std::fopen((scratch_.path() + "/file").c_str(), "w"));
  refuses(scratch_.path() + "/file", "not a directory");
  refuses(scratch_.path() + "/absent/child", "mkdir");
  refuses("relative/path", "absolute");
}

TEST_F(RuntimeDirectory, AnotherUsersDirectoryIsRefused) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs root to make one";
  const std::string other = scratch_.path() + "/other";
  fs::create_directory(other);
  fs::permissions(other, fs::perms::owner_all);
  ASSERT_EQ(::chown(other.c_str(), 12345, 12345), 0);
  refuses(other, "belongs to uid 12345");
}

class SocketPath : public RuntimeDirectory {
 protected:
  std::string path(const std::string& engine) {
    const ScopedEnv environment("LMCN_RUNTIME_DIR", scratch_.path() + "/run");
    auto path = socket_path(engine);
    EXPECT_TRUE(path.ok()) << path.status().to_string();
    return path.ok() ? *path : "";
  }
};

TEST_F(SocketPath, SafeIdsAreTheirName) {
  EXPECT_EQ(path("engine-0.dp_1"), scratch_.path() + "/run/engine-0.dp_1.sock");
}

TEST_F(SocketPath, OtherIdsAreHashedIntoTheDirectory) {
  std::vector<std::string> paths;
  for (const std::string& id : {std::string("../../etc/x"), std::string("a/b"), std::string("a b"), std::string(".hidden"),
                                std::string(".."), std::string("nul\0nul", 7), std::string("nul\0nuL", 7),
                                std::string("caf\xC3\xA9"), std::string(200, 'x'), std::string(201, 'x')}) {
    const std::string p = path(id);
    EXPECT_EQ(fs::path(p).parent_path(), scratch_.path() + "/run") << p;
    EXPECT_EQ(fs::path(p).filename().string().front(), '+');
    EXPECT_LT(p.size(), sizeof(sockaddr_un::sun_path));
    EXPECT_EQ(p, path(id)) << "stable";
    paths.push_back(p);
  }
  std::sort(paths.begin(), paths.end());
  EXPECT_EQ(std::unique(paths.begin(), paths.end()), paths.end());
}

TEST_F(SocketPath, RefusesEmptyIdsAndDirectoriesThatAreTooLong) {
  const std::string longest = scratch_.path() + "/" + std::string(80, 'd');
  const ScopedEnv environment("LMCN_RUNTIME_DIR", longest);
  EXPECT_EQ(socket_path("").status().code(), Code::kInvalidArgument);
  EXPECT_EQ(socket_path("e").status().code(), Code::kInvalidArgument);
  EXPECT_NE(socket_path("e").status().message().find("LMCN_RUNTIME_DIR"), std::string::npos);
}

}  // namespace
}  // namespace lmcn
