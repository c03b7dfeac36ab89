// The plugin itself, on host memory: kvikio with a libcuda that knows no device (libcuda_stub.c), or with none.
#include <dlfcn.h>
#include <fcntl.h>
#include <unistd.h>

#include <cstring>

#include "load_fixture.hpp"

namespace lmcn::load_test {

// What Python's libkvikio.load_library() loads, in its order.
const LmcnGdsPlugin* plugin_under_test() {
  static const Result<const LmcnGdsPlugin*> loaded = [] {
    // Not loaded yet: the plugin says what it needs.
    const Result<const LmcnGdsPlugin*> early = load_gds_plugin(LMCN_TEST_PLUGIN);
    EXPECT_FALSE(early.ok());
    EXPECT_NE(early.status().message().find("libkvikio.so"), std::string::npos) << early.status().to_string();
    const std::string libraries[] = {LMCN_TEST_RAPIDS_LOGGER, LMCN_TEST_CUFILE, LMCN_TEST_KVIKIO};
    return load_gds_plugin(LMCN_TEST_PLUGIN, libraries);
  }();
  EXPECT_TRUE(loaded.ok()) << loaded.status().to_string();
  return loaded.ok() ? *loaded : nullptr;
}
std::string name_under_test() {
  return "gds-compat";
}

namespace {

bool has_libcuda() {
  return ::dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL) != nullptr;
}

class Kvikio : public LoadFixture {
 protected:
  Kvikio() {
    probing.directory = root.path().string();
    probing.bytes = 16 * kMiB;
    probing.in_flight = 4;
    probing.plugin = plugin_under_test();
  }
  GdsProbeOptions probing;
};

TEST_F(Kvikio, TheProbeSaysCompat) {
  ASSERT_TRUE(has_libcuda()) << "run by ctest, which leads to the stub";
  const Result<GdsProbe> probe = probe_gds(probing);
  ASSERT_TRUE(probe.ok()) << probe.status().to_string();
  EXPECT_EQ(probe->mode, "compat") << probe->reason;
  EXPECT_GT(probe->gds_read, 0);
  EXPECT_GT(probe->gds_write, 0);
  EXPECT_FALSE(probe->use_gds());
}

TEST_F(Kvikio, RealGdsIsRefusedWithoutADevice) {
  // What make_device_loader() asks for a CUDA device: here the machine lacks all of it, and the plugin says so.
  const LmcnGdsPlugin* const plugin = plugin_under_test();
  char text[512] = "";
  LmcnGdsReader* reader = nullptr;
  const LmcnGdsOptions real{1, 0};
  const DeviceLoadItem item = write(0);
  const int fd = ::open(item.path.c_str(), O_RDONLY | O_CLOEXEC);
  ASSERT_GE(fd, 0);
  int failed = plugin->make(&real, &reader, {text, sizeof text});
  if (failed == 0) {
    std::uint32_t opened = 0;
    failed = plugin->open(reader, fd, 0, &opened, {text, sizeof text});
    plugin->destroy(reader);
  }
  ::close(fd);
  EXPECT_NE(failed, 0);
  EXPECT_GT(std::strlen(text), 0u);
}

// Run alone, in an environment without any libcuda.
TEST_F(Kvikio, DISABLED_WithoutLibcudaTheHostPathIsTaken) {
  ASSERT_FALSE(has_libcuda());
  make_loader();
  DeviceLoadJob job{.id = 1};
  for (std::uint32_t id = 0; id < 4; ++id) {
    add(job, write(id));
    expect_loaded(job, id, id);
  }
  EXPECT_TRUE(load(job).ok);
  expect_pages();
  EXPECT_EQ(loader->name(), "host");
  const std::vector<std::string> notes = loader->notes();
  ASSERT_EQ(notes.size(), 1u);
  EXPECT_NE(notes[0].find("libcuda.so.1"), std::string::npos) << notes[0];

  const Result<GdsProbe> probe = probe_gds(probing);
  ASSERT_TRUE(probe.ok()) << probe.status().to_string();
  EXPECT_EQ(probe->mode, "none");
  EXPECT_NE(probe->reason.find("libcuda.so.1"), std::string::npos) << probe->reason;
  EXPECT_GT(probe->host_read, 0);
}

}  // namespace
}  // namespace lmcn::load_test
