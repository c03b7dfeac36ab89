#include "attach/runtime_directory.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>

#include "attach/rendezvous.hpp"
#include "attach/rendezvous_wire.hpp"

namespace lmcn {
namespace {

std::string octal(mode_t mode) {
  char text[8];
  std::snprintf(text, sizeof text, "%04o", static_cast<unsigned>(mode & 07777));
  return text;
}

// XDG_RUNTIME_DIR is often inherited from a login on another machine; it counts only where it is a directory of ours.
std::string base_directory() {
  const char* const xdg = std::getenv("XDG_RUNTIME_DIR");
  struct stat status{};
  if (xdg != nullptr && xdg[0] == '/' && ::stat(xdg, &status) == 0 && S_ISDIR(status.st_mode) && status.st_uid == ::geteuid())
    return xdg;
  return "/tmp";
}

bool filename_safe(const std::string& id) {
  return id.front() != '.' && std::all_of(id.begin(), id.end(), [](char c) {
           return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' || c == '_' || c == '-';
         });
}

// Begins with '+', which no safe id has.
std::string hashed(const std::string& id) {
  const XXH128_hash_t hash = XXH3_128bits(id.data(), id.size());
  char text[34];
  std::snprintf(text, sizeof text, "+%016llx%016llx", static_cast<unsigned long long>(hash.high64),
                static_cast<unsigned long long>(hash.low64));
  return text;
}

}  // namespace

Result<UniqueFd> open_private_directory(const std::string& directory) {
  UniqueFd fd(::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
  if (!fd.valid()) {
    const int error = errno;
    const char* const why = error == ELOOP || error == ENOTDIR ? " is not a directory (a symlink is refused)" : "";
    return Status::from_errno(error, "runtime directory " + directory + why, Code::kInvalidArgument);
  }
  struct stat status{};
  if (::fstat(fd.get(), &status) != 0) return Status::from_errno(errno, "fstat of " + directory);
  if (status.st_uid != ::geteuid()) {
    return Status(Code::kInvalidArgument, "runtime directory " + directory + " belongs to uid " + std::to_string(status.st_uid) +
                                              ", not to " + std::to_string(::geteuid()));
  }
  if ((status.st_mode & 077) != 0) {
    return Status(Code::kInvalidArgument,
                  "runtime directory " + directory + " has mode " + octal(status.st_mode) + ", must be 0700");
  }
  return fd;
}

Result<std::string> runtime_directory() {
  const char* const override = std::getenv("LMCN_RUNTIME_DIR");
  std::string directory = override != nullptr ? override : "";
  if (directory.empty()) directory = base_directory() + "/lmcache-native-" + std::to_string(::geteuid());
  if (directory.front() != '/') {
    return Status(Code::kInvalidArgument, "LMCN_RUNTIME_DIR is \"" + directory + "\", must be an absolute path");
  }
  // A trailing slash would make open() follow a symlink.
  while (directory.size() > 1 && directory.back() == '/') directory.pop_back();
  if (::mkdir(directory.c_str(), 0700) != 0 && errno != EEXIST) {
    return Status::from_errno(errno, "mkdir of the runtime directory " + directory + " (LMCN_RUNTIME_DIR names another)",
                              Code::kInvalidArgument);
  }
  auto fd = open_private_directory(directory);
  if (!fd.ok()) return fd.status();
  return directory;
}

Result<std::string> socket_path(const std::string& engine_id) {
  if (engine_id.empty()) return Status(Code::kInvalidArgument, "engine_id is empty");
  auto directory = runtime_directory();
  if (!directory.ok()) return directory.status();
  std::string path = *directory + "/" + engine_id + kSocketSuffix;
  if (!filename_safe(engine_id) || path.size() > wire::kMaxPathBytes) path = *directory + "/" + hashed(engine_id) + kSocketSuffix;
  if (path.size() > wire::kMaxPathBytes) {
    return Status(Code::kInvalidArgument, "runtime directory " + *directory + " is too long: the socket's path would have " +
                                              std::to_string(path.size()) + " bytes, at most " +
                                              std::to_string(wire::kMaxPathBytes) + " fit (LMCN_RUNTIME_DIR names another)");
  }
  return path;
}

}  // namespace lmcn
