//! What a driver needs of the Windows kernel, declared and nothing more.
//!
//! [`base`] holds types and status constants, [`ntoskrnl`] the functions. Names, layouts and values
//! are those of the Windows Driver Kit's documentation, for 64-bit x86. The functions are imported
//! by `raw-dylib`: no import library, no WDK.
//!
//! Every function here is exported by `ntoskrnl.exe` of Windows 10 and is more than a stub in that
//! of Wine 8. What only later kernels have is to be looked up with
//! [`MmGetSystemRoutineAddress`](ntoskrnl::MmGetSystemRoutineAddress).

#![no_std]

pub mod base;
pub mod ntoskrnl;
