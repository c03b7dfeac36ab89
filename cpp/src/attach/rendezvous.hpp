// The rendezvous: how a worker process gets the arena of the process that owns the store.
// Unix SEQPACKET socket in a 0700 runtime directory, named from the engine's id; peer uid checked (SO_PEERCRED); the arena's
// memfd passed by SCM_RIGHTS. The connection stays open: its end tells the owner that the worker is gone.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "lmcn/status.hpp"
#include "memory/host_arena.hpp"

namespace lmcn {

/// What the owner tells each worker; a fixed-size packed message on the wire, versioned.
struct ArenaHandle {
  std::uint64_t arena_bytes = 0;
  std::uint64_t rank_bytes = 0;  // one rank's part of a slot payload, so that worker and owner can be checked against each other
  std::uint32_t rank_count = 0;
  std::uint32_t owner_pid = 0;
  bool replicated = false;  // StoreOptions::replicated
};

/// $XDG_RUNTIME_DIR (where it is a directory of ours) or /tmp based: DIR/lmcache-native-<uid>, created 0700; refused
/// (kInvalidArgument naming it) when it is a symlink, has another owner or wider mode. Override, as is: LMCN_RUNTIME_DIR (absolute;
/// its parent exists).
Result<std::string> runtime_directory();
/// Full socket path of an engine id (hashed when too long for sun_path or not filename-safe).
Result<std::string> socket_path(const std::string& engine_id);

class RendezvousOwner {
 public:
  /// Called on the owner's thread when a worker's connection ends (its process died or closed). May be empty; must not destroy the
  /// owner. Not called for workers that are attached when the owner is destroyed.
  using RankGone = std::function<void(std::uint32_t rank)>;

  /// Replaces a stale socket file (no listener behind it, or one whose process has ended); a live one is kLocked. `memfd` must
  /// outlive the owner. Stale sockets of other engine ids in the directory are removed too. kInvalidArgument: rank_count not 1..64,
  /// rank_bytes 0, arena_bytes not the memfd's size. fork(): the child holds copies of the sockets but no thread; destroying the
  /// owner there leaves socket file and workers alone.
  static Result<std::unique_ptr<RendezvousOwner>> listen(const std::string& engine_id, int memfd, const ArenaHandle& handle,
                                                         RankGone gone);
  virtual ~RendezvousOwner() = default;  // stops the thread, removes the socket file
  virtual const std::string& path() const noexcept = 0;
  virtual std::uint32_t attached_ranks() const noexcept = 0;
};

/// A worker's side: connect (retrying until the deadline), check, map. Destroying it closes the connection and unmaps.
class RendezvousClient {
 public:
  /// kDeadlineExceeded (names path and last failure); kInvalidArgument as in ArenaAttachment; kUnsupported: owner and worker are
  /// builds with different attach protocols; kLocked: another process is attached as this rank, until the deadline.
  static Result<std::unique_ptr<RendezvousClient>> attach(const std::string& engine_id, std::uint32_t rank,
                                                          std::uint64_t rank_bytes, std::chrono::milliseconds deadline,
                                                          bool replicated = false);
  virtual ~RendezvousClient() = default;
  virtual MappedArena& arena() noexcept = 0;
  virtual const ArenaHandle& handle() const noexcept = 0;
};

}  // namespace lmcn
