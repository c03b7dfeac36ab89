#include "io/uring_ring.hpp"

#include <sys/uio.h>

#include <algorithm>
#include <cassert>
#include <numeric>

#include "base/fork_guard.hpp"

namespace lmcn::io {
namespace {

constexpr unsigned kFileTable = 256;
constexpr unsigned kBufferTable = 1024;
constexpr std::size_t kMaxBufferBytes = 1ull << 30;  // the kernel's limit for one registered buffer

struct Mode {
  unsigned flags;
  const char* name;
};
constexpr Mode kModes[] = {
    {IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_TASKRUN_FLAG, "single issuer"},  // Linux 6.1
    {IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG, "cooperative"},                                  // Linux 5.19
    {0, "plain"},
};

Status unavailable(const std::string& what, int error) {
  return Status::from_errno(error, what, Code::kUnavailable);
}

}  // namespace

Status UringRing::open(unsigned in_flight) {
  // A child that inherited the ring would keep it, and all that is registered with it, after we died.
  {
    const fork_guard::Hold hold;
    LMCN_RETURN_IF_ERROR(set_up(in_flight));
    open_ = true;
    fork_guard::add(hold, ring_.ring_fd);
  }
  LMCN_RETURN_IF_ERROR(check_operations());
  LMCN_RETURN_IF_ERROR(no_op_round());
  io_uring_ring_dontfork(&ring_);     // where it fails the child keeps the memory, no more
  io_uring_register_ring_fd(&ring_);  // saves a descriptor look-up per call where the kernel can (5.18); optional
  has_buffer_table_ = io_uring_register_buffers_sparse(&ring_, kBufferTable) == 0;
  has_file_table_ = io_uring_register_files_sparse(&ring_, kFileTable) == 0;
  if (has_file_table_) {
    free_files_.resize(kFileTable);
    std::iota(free_files_.rbegin(), free_files_.rend(), 0u);
  }
  return {};
}

Status UringRing::set_up(unsigned in_flight) {
  int rc = 0;
  for (const Mode& mode : kModes) {
    io_uring_params params{};
    params.flags = mode.flags;
    rc = io_uring_queue_init_params(in_flight, &ring_, &params);
    if (rc == -EINVAL) continue;
    if (rc < 0) break;
    mode_ = mode.name;
    if (params.features & IORING_FEAT_NODROP) return {};
    io_uring_queue_exit(&ring_);
    return Status(Code::kUnavailable, "io_uring of this kernel may drop completions (Linux 5.5 or later is needed)");
  }
  return unavailable("io_uring_setup of " + std::to_string(in_flight) + " entries", -rc);
}

Status UringRing::check_operations() noexcept {
  io_uring_probe* probe = io_uring_get_probe_ring(&ring_);
  if (probe == nullptr) return Status(Code::kUnavailable, "io_uring cannot be probed (Linux 5.6 or later is needed)");
  int missing = -1;
  for (const int op : {IORING_OP_READ, IORING_OP_WRITE, IORING_OP_READ_FIXED, IORING_OP_WRITE_FIXED, IORING_OP_FSYNC}) {
    if (!io_uring_opcode_supported(probe, op)) missing = op;
  }
  io_uring_free_probe(probe);
  if (missing < 0) return {};
  return Status(Code::kUnavailable, "io_uring of this kernel lacks operation " + std::to_string(missing));
}

Status UringRing::no_op_round() noexcept {
  constexpr std::uint64_t kNoOp = 0x6e6f6f70;
  io_uring_sqe* sqe = entry();
  io_uring_prep_nop(sqe);
  io_uring_sqe_set_data64(sqe, kNoOp);
  int error = 0;
  do error = enter(true);
  while (error == EINTR);
  if (error != 0) return unavailable("io_uring_enter", error);
  const std::span<const Completion> completions = reap();
  if (completions.size() != 1 || completions[0].user_data != kNoOp || completions[0].answer != 0) {
    return Status(Code::kUnavailable, "io_uring did not return a no-op");
  }
  return {};
}

void UringRing::close() noexcept {
  if (!open_) return;
  // The kernel would do this too, but some time after the descriptor is closed.
  if (has_file_table_) io_uring_unregister_files(&ring_);
  if (has_buffer_table_) io_uring_unregister_buffers(&ring_);
  const fork_guard::Hold hold;
  fork_guard::remove(hold, ring_.ring_fd);
  io_uring_queue_exit(&ring_);
  open_ = false;
}

Status UringRing::register_buffer(std::span<std::byte> buffer) {
  if (!has_buffer_table_) return Status(Code::kUnavailable, "io_uring has no sparse buffer table (Linux 5.19 or later is needed)");
  for (std::size_t done = 0; done < buffer.size(); done += kMaxBufferBytes) {
    LMCN_RETURN_IF_ERROR(register_piece(buffer.data() + done, std::min(kMaxBufferBytes, buffer.size() - done)));
  }
  return {};
}

Status UringRing::register_piece(std::byte* data, std::size_t bytes) {
  const auto begin = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t end = begin + bytes;
  auto after = buffers_.lower_bound(begin);
  if ((after != buffers_.end() && after->first < end) || (after != buffers_.begin() && std::prev(after)->second.end > begin)) {
    return Status(Code::kInvalidArgument, "buffer of " + std::to_string(bytes) + " bytes overlaps one that is registered already");
  }
  if (next_buffer_ == kBufferTable) {
    return Status(Code::kResourceExhausted, "all " + std::to_string(kBufferTable) + " registered buffers are in use");
  }
  const iovec piece{data, bytes};
  const __u64 tag = 0;
  const int rc = io_uring_register_buffers_update_tag(&ring_, next_buffer_, &piece, &tag, 1);
  if (rc < 0) {
    return Status::from_errno(-rc, "registering " + std::to_string(bytes) + " bytes with io_uring (limit: ulimit -l)",
                              Code::kResourceExhausted);
  }
  buffers_.emplace(begin, Buffer{end, next_buffer_++});
  return {};
}

Status UringRing::register_fd(int fd) {
  if (files_.contains(fd)) {
    return Status(Code::kInvalidArgument, "descriptor " + std::to_string(fd) + " is registered already");
  }
  if (!has_file_table_) return Status(Code::kUnavailable, "io_uring has no sparse file table (Linux 5.19 or later is needed)");
  if (free_files_.empty()) {
    return Status(Code::kResourceExhausted, "all " + std::to_string(kFileTable) + " registered files are in use");
  }
  const unsigned place = free_files_.back();
  const int rc = io_uring_register_files_update(&ring_, place, &fd, 1);
  if (rc < 0) return Status::from_errno(-rc, "registering descriptor " + std::to_string(fd) + " with io_uring");
  free_files_.pop_back();
  files_.emplace(fd, place);
  return {};
}

void UringRing::unregister_fd(int fd) noexcept {
  const auto found = files_.find(fd);
  if (found == files_.end()) return;
  const int none = -1;
  // A place that could not be cleared is not used again.
  if (io_uring_register_files_update(&ring_, found->second, &none, 1) == 1) free_files_.push_back(found->second);
  files_.erase(found);
}

int UringRing::buffer_index(const std::byte* data, std::uint64_t bytes) const noexcept {
  const auto begin = reinterpret_cast<std::uintptr_t>(data);
  auto after = buffers_.upper_bound(begin);
  if (after == buffers_.begin()) return -1;
  const Buffer& buffer = std::prev(after)->second;
  return begin + bytes <= buffer.end ? static_cast<int>(buffer.index) : -1;
}

// The queue has room: it has `in_flight` entries, and each unfinished submission has at most one.
io_uring_sqe* UringRing::entry() noexcept {
  io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
  assert(sqe != nullptr);
  return sqe;
}

UringRing::Path UringRing::prepare(const Transfer& transfer, std::uint64_t user_data) noexcept {
  const IoRequest& request = transfer.request();
  // Kernel workers look a registered file up when they start, which may be after unregister_fd(); they do syncs and what
  // IOSQE_ASYNC hands to them. The descriptor itself stays open until the completion.
  const bool by_worker = request.op == Op::kSync || transfer.interrupted();
  const auto file = by_worker ? files_.end() : files_.find(request.fd);
  const int fd = file == files_.end() ? request.fd : static_cast<int>(file->second);
  io_uring_sqe* sqe = entry();
  int buffer = -1;
  if (request.op == Op::kSync) {
    io_uring_prep_fsync(sqe, fd, IORING_FSYNC_DATASYNC);
  } else {
    buffer = buffer_index(transfer.data(), transfer.bytes());
    if (request.op == Op::kRead && buffer >= 0) {
      io_uring_prep_read_fixed(sqe, fd, transfer.data(), transfer.bytes(), transfer.offset(), buffer);
    } else if (request.op == Op::kRead) {
      io_uring_prep_read(sqe, fd, transfer.data(), transfer.bytes(), transfer.offset());
    } else if (buffer >= 0) {
      io_uring_prep_write_fixed(sqe, fd, transfer.data(), transfer.bytes(), transfer.offset(), buffer);
    } else {
      io_uring_prep_write(sqe, fd, transfer.data(), transfer.bytes(), transfer.offset());
    }
  }
  if (file != files_.end()) sqe->flags |= IOSQE_FIXED_FILE;
  if (transfer.interrupted()) sqe->flags |= IOSQE_ASYNC;  // a kernel worker may block where this thread got EAGAIN
  io_uring_sqe_set_data64(sqe, user_data);
  return buffer >= 0 ? Path::kFixedBuffer : Path::kPlain;
}

void UringRing::prepare_read(int fd, void* data, unsigned bytes, std::uint64_t user_data) noexcept {
  io_uring_sqe* sqe = entry();
  io_uring_prep_read(sqe, fd, data, bytes, 0);
  io_uring_sqe_set_data64(sqe, user_data);
}

int UringRing::enter(bool wait) noexcept {
  const int rc = wait ? io_uring_submit_and_wait(&ring_, 1) : has_prepared() ? io_uring_submit(&ring_) : 0;
  return rc < 0 ? -rc : 0;
}

std::vector<std::uint64_t> UringRing::prepared() const {
  std::vector<std::uint64_t> left;
  for (unsigned i = ring_.sq.sqe_tail - io_uring_sq_ready(&ring_); i != ring_.sq.sqe_tail; ++i) {
    left.push_back(ring_.sq.sqes[i & ring_.sq.ring_mask].user_data);
  }
  return left;
}

std::span<const UringRing::Completion> UringRing::reap() noexcept {
  std::array<io_uring_cqe*, std::tuple_size_v<decltype(reaped_)>> entries;
  const unsigned count = io_uring_peek_batch_cqe(&ring_, entries.data(), static_cast<unsigned>(entries.size()));
  for (unsigned i = 0; i < count; ++i) reaped_[i] = {entries[i]->user_data, entries[i]->res};
  io_uring_cq_advance(&ring_, count);  // before anything looks at them: an answer is never seen twice
  return {reaped_.data(), count};
}

}  // namespace lmcn::io
