// Pages and staging in host memory, for test executables without a device.
#include "load_fixture.hpp"

namespace lmcn::load_test {

int device_under_test() {
  return -1;
}
std::byte* allocate_pages(std::size_t bytes) {
  return new std::byte[bytes];
}
void release_pages(std::byte* pages) {
  delete[] pages;
}

}  // namespace lmcn::load_test
