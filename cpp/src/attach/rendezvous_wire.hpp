// What goes over the arena socket: fixed-size messages, host byte order (both ends are one machine).
//
//   worker -> owner   Hello
//   owner -> worker   Reply; when `code` is kOk the arena's memfd comes along (SCM_RIGHTS)
//   worker -> owner   Goodbye, when it detaches: no copy of it is under way. One that ends without says nothing of its copies.
//
// magic, version, code and text keep their places in every version, so that any two builds can tell each other what is wrong.
#pragma once

#include <sys/socket.h>
#include <sys/un.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>

#include "attach/rendezvous.hpp"
#include "lmcn/status.hpp"
#include "memory/unique_fd.hpp"

namespace lmcn::wire {

inline constexpr std::uint64_t kHelloMagic = 0x4C48454E434D4C31ULL;
inline constexpr std::uint64_t kReplyMagic = 0x5952504E434D4C31ULL;
inline constexpr std::uint64_t kGoodbyeMagic = 0x45594242444F4F47ULL;
inline constexpr std::uint32_t kVersion = 1;
inline constexpr std::chrono::milliseconds kHelloDeadline{2000};  // of an accepted connection; the owner closes it then
inline constexpr std::size_t kMaxPathBytes = sizeof(sockaddr_un::sun_path) - 1;

struct Hello {
  std::uint64_t magic = kHelloMagic;
  std::uint32_t version = kVersion;
  std::uint32_t rank = 0;
  std::uint64_t rank_bytes = 0;
  std::uint32_t pid = 0;
  std::uint32_t replicated = 0;  // 1: this rank reads the one part that rank 0 fills
};
static_assert(sizeof(Hello) == 32 && offsetof(Hello, version) == 8);

struct Goodbye {
  std::uint64_t magic = kGoodbyeMagic;
};

struct Reply {
  std::uint64_t magic = kReplyMagic;
  std::uint32_t version = kVersion;
  std::uint32_t code = 0;  // lmcn::Code
  char text[480] = {};     // why, when code is not kOk; ends with 0
  std::uint64_t arena_bytes = 0;
  std::uint64_t rank_bytes = 0;
  std::uint32_t rank_count = 0;
  std::uint32_t owner_pid = 0;
};
static_assert(sizeof(Reply) == 520 && offsetof(Reply, code) == 12 && offsetof(Reply, text) == 16 &&
              offsetof(Reply, arena_bytes) == 496);

struct Address {
  sockaddr_un sun{};
  socklen_t length = 0;
};
/// REQUIRES: a path from socket_path().
Address address_of(const std::string& path);

/// Of the process at the other end, readable once it has exited; invalid where the kernel has or allows none, or the process is
/// gone. kUnavailable: there would be one, but for want of a descriptor or of memory.
Result<UniqueFd> peer_process(int socket, pid_t pid);

UniqueFd seqpacket_socket();  // non-blocking, close-on-exec; invalid with errno set

/// The other end's user and process as the kernel knows them. Of a listening socket's peer: those that called listen().
Result<ucred> peer_of(int socket);
/// Whether that process is known to have ended. (Its socket can live on in a child it forked.)
bool has_ended(pid_t pid) noexcept;

Reply refusal(const Status& why);
Status status_of(const Reply& reply);

/// Never waits; no SIGPIPE. kUnavailable when the peer has gone or takes nothing.
Status send_hello(int socket, const Hello& hello);
void send_goodbye(int socket) noexcept;  // a peer that is gone needs none
Status send_reply(int socket, const Reply& reply, int memfd /* -1: none */);

/// One whole message, received when poll() says so. kUnavailable: the peer has gone. kInvalidArgument: not a message of ours.
Status receive_hello(int socket, Hello& hello);
Status receive_goodbye(int socket);
Status receive_reply(int socket, Reply& reply, UniqueFd& memfd);

}  // namespace lmcn::wire
