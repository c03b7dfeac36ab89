# cmake -DSOURCE=<package> -DTARGET=<folder> -P link_package.cmake: one symbolic link in TARGET per entry of SOURCE.
file(MAKE_DIRECTORY "${TARGET}")
file(GLOB entries RELATIVE "${SOURCE}" "${SOURCE}/*")
list(FILTER entries EXCLUDE REGEX "^__pycache__$|\\.so$")
foreach(entry IN LISTS entries)
  file(CREATE_LINK "${SOURCE}/${entry}" "${TARGET}/${entry}" SYMBOLIC)
endforeach()
