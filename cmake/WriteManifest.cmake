# Writes what was built, and with what, where setup.py picks it up.
function(write_manifest path)
  if(SORTED_KERNELS_CUDA)
    set(cuda true)
    string(REPLACE ";" "\", \"" archs "${SORTED_KERNELS_ARCHS}")
    set(archs "[\"${archs}\"]")
    set(nvcc "\"${CMAKE_CUDA_COMPILER_VERSION}\"")
  else()
    set(cuda false)
    set(archs "[]")
    set(nvcc null)
  endif()
  # Device code is promoted by digest: see sorted_kernels/ops/promotion.py.
  set(sources "")
  if(SORTED_KERNELS_CUDA)
    file(GLOB device_sources RELATIVE "${CMAKE_CURRENT_SOURCE_DIR}" CONFIGURE_DEPENDS
         csrc/kernels/* csrc/common/*)
    foreach(source IN LISTS device_sources)
      set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${source}")
      file(SHA256 "${source}" sha)
      list(APPEND sources "\n    \"${source}\": \"${sha}\"")
    endforeach()
    list(JOIN sources "," sources)
  endif()
  file(CONFIGURE OUTPUT "${path}" CONTENT [[{
  "cuda": @cuda@,
  "archs": @archs@,
  "nvcc": @nvcc@,
  "cxx": "@CMAKE_CXX_COMPILER_ID@ @CMAKE_CXX_COMPILER_VERSION@",
  "torch": "@SORTED_KERNELS_TORCH_VERSION@",
  "version": "@PROJECT_VERSION@",
  "sources": {@sources@}
}
]] @ONLY)
endfunction()
