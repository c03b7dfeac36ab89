#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>

#include "attach/rendezvous.hpp"
#include "attach/rendezvous_wire.hpp"
#include "lmcn/attach.hpp"

namespace lmcn {
namespace {

using Clock = std::chrono::steady_clock;

// A reply that does not come in this time is asked for again: the listener may be left over from an owner that has ended. Each
// time twice as patiently: the owner may live on a machine that is that slow.
constexpr std::chrono::milliseconds kFirstReplyWait{1000};
constexpr int kFirstPause_ms = 1;
constexpr int kMaxPause_ms = 20;

class SocketClient final : public RendezvousClient {
 public:
  SocketClient(UniqueFd socket, std::unique_ptr<MappedArena> arena, const ArenaHandle& handle)
      : socket_(std::move(socket)), arena_(std::move(arena)), handle_(handle) {}
  MappedArena& arena() noexcept override { return *arena_; }
  const ArenaHandle& handle() const noexcept override { return handle_; }

 private:
  UniqueFd socket_;
  std::unique_ptr<MappedArena> arena_;
  ArenaHandle handle_;
};

int milliseconds_until(Clock::time_point when) {
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(when - Clock::now()).count();
  return static_cast<int>(std::clamp<std::int64_t>(left, 0, 1 << 30));
}

// What may become right by itself before the deadline: no owner yet, an owner that stops, a rank whose earlier worker still ends.
bool may_pass(const Status& status) {
  return status.code() == Code::kUnavailable || status.code() == Code::kLocked;
}

Result<UniqueFd> connect_to(const std::string& path) {
  UniqueFd socket = wire::seqpacket_socket();
  if (!socket.valid()) return Status::from_errno(errno, "socket");
  const wire::Address address = wire::address_of(path);
  if (::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address.sun), address.length) != 0) {
    const bool passing = errno == ENOENT || errno == ECONNREFUSED || errno == EAGAIN || errno == EINTR;
    return Status::from_errno(errno, "connect to " + path, passing ? Code::kUnavailable : Code::kIoError);
  }
  const auto peer = wire::peer_of(socket.get());
  if (!peer.ok()) return peer.status();
  if (peer->uid != ::geteuid()) {
    return Status(Code::kInvalidArgument,
                  path + " is served by uid " + std::to_string(peer->uid) + ", not by " + std::to_string(::geteuid()));
  }
  return socket;
}

Status await_reply(int socket, Clock::time_point until, const std::string& path) {
  pollfd event{socket, POLLIN, 0};
  for (;;) {
    const int ready = ::poll(&event, 1, milliseconds_until(until));
    if (ready > 0) return {};
    if (ready < 0 && errno != EINTR) return Status::from_errno(errno, "poll");
    if (Clock::now() >= until) return {Code::kUnavailable, "no reply from the owner at " + path};
  }
}

Result<std::unique_ptr<RendezvousClient>> attach_once(const std::string& path, const wire::Hello& hello,
                                                      Clock::time_point reply_until) {
  auto socket = connect_to(path);
  if (!socket.ok()) return socket.status();
  wire::Reply reply;
  UniqueFd memfd;
  // A refusal may be there although the hello could not be sent any more.
  const Status sent = wire::send_hello(socket->get(), hello);
  LMCN_RETURN_IF_ERROR(await_reply(socket->get(), reply_until, path));
  const Status received = wire::receive_reply(socket->get(), reply, memfd);
  if (!received.ok()) return received.code() == Code::kUnavailable && !sent.ok() ? sent : received;
  LMCN_RETURN_IF_ERROR(wire::status_of(reply));
  if (reply.version != hello.version) {
    return Status(Code::kUnsupported, "the owner at " + path + " speaks version " + std::to_string(reply.version) +
                                          " of the attach protocol, this worker version " + std::to_string(hello.version));
  }
  if (!memfd.valid()) return Status(Code::kInvalidArgument, "the owner at " + path + " sent no arena (too many open files here?)");
  auto arena = MappedArena::map(memfd.release(), reply.arena_bytes);
  if (!arena.ok()) return arena.status();
  const ArenaHandle handle{reply.arena_bytes, reply.rank_bytes, reply.rank_count, reply.owner_pid, hello.replicated != 0};
  return std::unique_ptr<RendezvousClient>(std::make_unique<SocketClient>(std::move(*socket), std::move(*arena), handle));
}

class ClientAttachment final : public ArenaAttachment {
 public:
  explicit ClientAttachment(std::unique_ptr<RendezvousClient> client) : client_(std::move(client)) {}
  std::byte* base() noexcept override { return client_->arena().base(); }
  std::uint64_t bytes() const noexcept override { return client_->arena().bytes(); }
  std::uint32_t owner_pid() const noexcept override { return client_->handle().owner_pid; }

 private:
  std::unique_ptr<RendezvousClient> client_;
};

}  // namespace

Result<std::unique_ptr<RendezvousClient>> RendezvousClient::attach(const std::string& engine_id, std::uint32_t rank,
                                                                   std::uint64_t rank_bytes, std::chrono::milliseconds deadline,
                                                                   bool replicated) {
  auto path = socket_path(engine_id);
  if (!path.ok()) return path.status();
  wire::Hello hello;
  hello.rank = rank;
  hello.rank_bytes = rank_bytes;
  hello.pid = static_cast<std::uint32_t>(::getpid());
  hello.replicated = replicated ? 1 : 0;
  const auto until = Clock::now() + deadline;
  Status last;
  auto reply_wait = kFirstReplyWait;
  for (int pause_ms = kFirstPause_ms;; pause_ms = std::min(2 * pause_ms, kMaxPause_ms)) {
    const auto reply_until = Clock::now() + reply_wait;
    auto client = attach_once(*path, hello, std::min(until, reply_until));
    if (Clock::now() >= reply_until) reply_wait *= 2;
    if (client.ok() || !may_pass(client.status())) return client;
    // An owner's refusal says more than that no reply came in what was left of the time.
    if (last.code() != Code::kLocked || client.status().code() == Code::kLocked) last = client.status();
    if (Clock::now() >= until) break;
    ::poll(nullptr, 0, std::min(pause_ms, milliseconds_until(until)));
  }
  if (last.code() == Code::kLocked) return last;
  return Status(Code::kDeadlineExceeded, "no owner of engine \"" + engine_id + "\" let rank " + std::to_string(rank) +
                                             " attach within " + std::to_string(deadline.count()) + " ms at " + *path +
                                             " (last: " + last.message() + ")");
}

Result<std::unique_ptr<ArenaAttachment>> ArenaAttachment::attach(const std::string& engine_id, std::uint32_t rank,
                                                                 std::uint64_t rank_bytes, std::chrono::milliseconds deadline,
                                                                 bool replicated) {
  auto client = RendezvousClient::attach(engine_id, rank, rank_bytes, deadline, replicated);
  if (!client.ok()) return client.status();
  return std::unique_ptr<ArenaAttachment>(std::make_unique<ClientAttachment>(std::move(*client)));
}

}  // namespace lmcn
