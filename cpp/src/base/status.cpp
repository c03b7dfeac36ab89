#include "lmcn/status.hpp"

#include <array>
#include <system_error>

#include "lmcn/key.hpp"

namespace lmcn {
namespace {

std::string hex(const std::array<std::uint8_t, 32>& bytes) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  text.reserve(2 * bytes.size());
  for (const std::uint8_t b : bytes) {
    text.push_back(kDigits[b >> 4]);
    text.push_back(kDigits[b & 15]);
  }
  return text;
}

}  // namespace

const char* code_name(Code code) noexcept {
  switch (code) {
    case Code::kOk:
      return "ok";
    case Code::kInvalidArgument:
      return "invalid_argument";
    case Code::kNotFound:
      return "not_found";
    case Code::kResourceExhausted:
      return "resource_exhausted";
    case Code::kUnavailable:
      return "unavailable";
    case Code::kDeadlineExceeded:
      return "deadline_exceeded";
    case Code::kCorruption:
      return "corruption";
    case Code::kIoError:
      return "io_error";
    case Code::kFormatVersion:
      return "format_version";
    case Code::kLocked:
      return "locked";
    case Code::kAborted:
      return "aborted";
    case Code::kUnsupported:
      return "unsupported";
    case Code::kInternal:
      return "internal";
  }
  return "unknown";
}

Status Status::from_errno(int sys_errno, std::string what, Code code) {
  return Status(code, std::move(what) + ": " + std::generic_category().message(sys_errno) + " (" + std::to_string(sys_errno) + ")",
                sys_errno);
}

std::string Status::to_string() const {
  return ok() ? std::string("ok") : std::string(code_name(code_)) + ": " + message_;
}

std::string ChunkKey::to_hex() const {
  return hex(bytes);
}
std::string NamespaceId::to_hex() const {
  return hex(bytes);
}

}  // namespace lmcn
