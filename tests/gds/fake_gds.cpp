#include "fake_gds.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cstddef>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <mutex>
#include <span>
#include <string>
#include <vector>

struct LmcnGdsReader {
  std::atomic<std::uint32_t> files{0};
};

namespace lmcn::load_test {
namespace {

void called() {
  if (fake_gds().on_call) fake_gds().on_call();
}

int fail(LmcnGdsError error, const char* text) {
  std::snprintf(error.text, error.bytes, "%s", text);
  return 1;
}

struct Late {
  std::mutex mutex;
  std::vector<std::span<std::byte>> memory;
};
Late& late() {
  static Late late;
  return late;
}

bool hangs(std::uint32_t file) {
  const FakeGds& fake = fake_gds();
  if (fake.fault != Fault::kHang) return false;
  return fake.hang_path.empty() || std::filesystem::read_symlink("/proc/self/fd/" + std::to_string(file)) == fake.hang_path;
}

int make(const LmcnGdsOptions*, LmcnGdsReader** reader, LmcnGdsError error) {
  called();
  if (fake_gds().fault == Fault::kMake) return fail(error, "nvidia-fs is not loaded");
  *reader = new LmcnGdsReader;
  ++fake_gds().readers;
  return 0;
}
void destroy(LmcnGdsReader* reader) {
  --fake_gds().readers;
  delete reader;
}
int register_memory(LmcnGdsReader*, void*, std::uint64_t bytes, LmcnGdsError) {
  fake_gds().registered_bytes = bytes;
  return 0;
}
// A file's number is its descriptor.
int open_file(LmcnGdsReader*, int fd, int writable, std::uint32_t* file, LmcnGdsError error) {
  called();
  if (fake_gds().fault == Fault::kOpen) return fail(error, "file system not supported");
  const int own = ::open(("/proc/self/fd/" + std::to_string(fd)).c_str(), (writable != 0 ? O_RDWR : O_RDONLY) | O_CLOEXEC);
  if (own < 0) return fail(error, std::strerror(errno));
  *file = static_cast<std::uint32_t>(own);
  ++fake_gds().open_files;
  return 0;
}
void close_file(LmcnGdsReader*, std::uint32_t file) {
  --fake_gds().open_files;
  ::close(static_cast<int>(file));
}
int state(LmcnGdsReader*, std::uint32_t, LmcnGdsState* state, LmcnGdsError) {
  state->compat = fake_gds().compat ? 1 : 0;
  std::snprintf(state->reason, sizeof state->reason, "%s", "a fake");
  return 0;
}
int read_file(LmcnGdsReader*, std::uint32_t file, std::uint64_t offset, void* memory, std::uint64_t bytes, LmcnGdsError error) {
  called();
  FakeGds& fake = fake_gds();
  if (fake.on_read) fake.on_read();
  ++fake.reads;
  if (hangs(file)) {
    ++fake.hanging;
    fake.hanging.notify_all();
    fake.fault.wait(Fault::kHang);
  }
  if (fake.fault == Fault::kReadEnded) return fail(error, "DMA failed");
  if (fake.fault == Fault::kRead) {
    std::lock_guard lock(late().mutex);
    late().memory.emplace_back(static_cast<std::byte*>(memory), bytes);
    fail(error, "DMA failed");
    return LMCN_GDS_LOST;
  }
  const ssize_t n = ::pread(static_cast<int>(file), memory, bytes, static_cast<off_t>(offset));
  if (n != static_cast<ssize_t>(bytes)) return fail(error, "short read");
  if (fake.fault == Fault::kWrongBytes) static_cast<std::byte*>(memory)[bytes / 2] ^= std::byte{1};
  return 0;
}
int write_file(LmcnGdsReader*, std::uint32_t file, std::uint64_t offset, const void* memory, std::uint64_t bytes,
               LmcnGdsError error) {
  called();
  if (::pwrite(static_cast<int>(file), memory, bytes, static_cast<off_t>(offset)) == static_cast<ssize_t>(bytes)) return 0;
  return fail(error, "short write");
}

}  // namespace

FakeGds& fake_gds() {
  static FakeGds fake;
  return fake;
}

std::size_t write_late() {
  std::lock_guard lock(late().mutex);
  for (const std::span<std::byte> memory : late().memory) std::memset(memory.data(), 0xEE, memory.size());
  return late().memory.size();
}
void end_late() {
  std::lock_guard lock(late().mutex);
  late().memory.clear();
}

const LmcnGdsPlugin kFakeGds{LMCN_GDS_PLUGIN_ABI, "0",        "0",   make,      destroy,   register_memory,
                             open_file,           close_file, state, read_file, write_file};

}  // namespace lmcn::load_test
