# LMCN_CUDA=AUTO|ON|OFF -> LMCN_WITH_CUDA. (The CUDA room fills this in.)
set(LMCN_WITH_CUDA OFF)
