//! What `kernel_module!` expands to, and what it calls. Not for use by hand.

use crate::allocator;
use crate::device_list;
use crate::driver::{Driver, KernelModule};
use crate::error::Error;
use crate::unicode;
use core::cell::UnsafeCell;
use core::mem::MaybeUninit;
use windows_kernel_sys::base::STATUS_SUCCESS;
pub use windows_kernel_sys::base::{DRIVER_OBJECT, DRIVER_UNLOAD, NTSTATUS, UNICODE_STRING};

/// What the linker is told by the object file, so that nobody need tell it by hand.
///
/// `/NODEFAULTLIB` alone is refused in an object file; `msvcrt` is the one library that rustc asks
/// for. An unoptimised `compiler_builtins`, as in a debug build with `-Zbuild-std`, refers to `fma`
/// and `fmaf` and never calls them: should anybody do, the machine stops instead of reckoning
/// wrong.
pub const DIRECTIVES: [u8; 124] = *b" /ENTRY:DriverEntry /SUBSYSTEM:NATIVE /NODEFAULTLIB:msvcrt \
    /ALTERNATENAME:fma=KeBugCheckEx /ALTERNATENAME:fmaf=KeBugCheckEx ";

/// Where the module lives: in the image, so that to keep it cannot fail.
pub struct ModuleSlot<Module> {
    module: UnsafeCell<MaybeUninit<Module>>,
}

// SAFETY: the module may be used from any thread, and moved to any; the kernel calls `start` and
// `stop` one after the other.
unsafe impl<Module: KernelModule> Sync for ModuleSlot<Module> {}

impl<Module: KernelModule> ModuleSlot<Module> {
    /// An empty slot.
    #[must_use]
    #[allow(clippy::new_without_default)]
    pub const fn new() -> Self {
        Self {
            module: UnsafeCell::new(MaybeUninit::uninit()),
        }
    }

    /// `DriverEntry`.
    ///
    /// # Safety
    ///
    /// The arguments are those that the kernel gave to `DriverEntry`; it calls this once, with
    /// `unload` leading to [`stop`](Self::stop) of the same slot.
    pub unsafe fn start(
        &self,
        driver: *mut DRIVER_OBJECT,
        registry_path: *const UNICODE_STRING,
        unload: DRIVER_UNLOAD,
    ) -> NTSTATUS {
        // Before `init`, which may take it away again.
        // SAFETY: the object is live, and ours alone until `DriverEntry` returns.
        unsafe { (*driver).DriverUnload = Some(unload) };
        // SAFETY: as the caller promises.
        match unsafe { init::<Module>(driver, registry_path) } {
            Ok(module) => {
                // SAFETY: nobody else uses the slot before `DriverEntry` returns.
                unsafe { (*self.module.get()).write(module) };
                STATUS_SUCCESS
            }
            Err(error) => {
                // SAFETY: `DriverEntry` is running, and this is its thread.
                unsafe { device_list::delete_all() };
                error.to_failure()
            }
        }
    }

    /// `DriverUnload`.
    ///
    /// # Safety
    ///
    /// `driver` is what the kernel gave to `DriverUnload`; it calls this once, after a successful
    /// [`start`](Self::start).
    pub unsafe fn stop(&self, driver: *mut DRIVER_OBJECT) {
        // SAFETY: `DriverUnload` is running, and this is its thread. `start` put a module there, and
        // nobody else uses it.
        unsafe {
            device_list::delete_all();
            let module = &mut *self.module.get();
            module.assume_init_mut().cleanup(Driver::from_raw(driver));
            module.assume_init_drop();
        }
    }
}

/// # Safety
///
/// As for [`ModuleSlot::start`].
unsafe fn init<Module: KernelModule>(
    driver: *mut DRIVER_OBJECT,
    registry_path: *const UNICODE_STRING,
) -> Result<Module, Error> {
    allocator::find_pool_functions();
    #[cfg(feature = "fail-allocation")]
    // SAFETY: as the caller promises.
    allocator::FAILURE.arm(unsafe { crate::parameters::fail_allocation(registry_path) }?);
    // SAFETY: as the caller promises.
    let (driver, path) = unsafe {
        (
            Driver::from_raw(driver),
            unicode::try_decode(registry_path)?,
        )
    };
    Module::init(driver, &path)
}

/// Makes a driver of a [`KernelModule`].
///
/// `kernel_module!(Module)` tags the driver's memory with the first four letters of the package's
/// name; `kernel_module!(Module, tag = *b"hell")` with letters of its own choice. A tag that is
/// zero or has other than printable ASCII characters does not compile:
///
/// ```no_run
/// # use windows_kernel_rs::{Driver, Error, KernelModule, kernel_module};
/// # struct Module;
/// # impl KernelModule for Module {
/// #     fn init(_: Driver, _: &str) -> Result<Self, Error> { Ok(Module) }
/// #     fn cleanup(&mut self, _: Driver) {}
/// # }
/// const TAG: [u8; 4] = *b"hell";
/// kernel_module!(Module, tag = TAG);
/// ```
/// ```compile_fail,E0080
/// # use windows_kernel_rs::{Driver, Error, KernelModule, kernel_module};
/// # struct Module;
/// # impl KernelModule for Module {
/// #     fn init(_: Driver, _: &str) -> Result<Self, Error> { Ok(Module) }
/// #     fn cleanup(&mut self, _: Driver) {}
/// # }
/// kernel_module!(Module, tag = [0; 4]);
/// ```
/// ```compile_fail,E0080
/// # use windows_kernel_rs::{Driver, Error, KernelModule, kernel_module};
/// # struct Module;
/// # impl KernelModule for Module {
/// #     fn init(_: Driver, _: &str) -> Result<Self, Error> { Ok(Module) }
/// #     fn cleanup(&mut self, _: Driver) {}
/// # }
/// kernel_module!(Module, tag = *b"h\xe9ll");
/// ```
///
/// It makes the global allocator, the entry point `DriverEntry` (exported as `driver_entry` too),
/// `DriverUnload`, and the linker's directives.
#[macro_export]
macro_rules! kernel_module {
    ($module:ty $(,)?) => {
        $crate::__kernel_module!(
            $module,
            $crate::PoolTag::of_package(::core::env!("CARGO_PKG_NAME"))
        );
    };
    ($module:ty, tag = $letters:expr $(,)?) => {
        $crate::__kernel_module!($module, $crate::PoolTag::new($letters));
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __kernel_module {
    ($module:ty, $tag:expr) => {
        // A driver that denies itself `unsafe` can still be one.
        #[allow(unsafe_code)]
        const _: () = {
            use $crate::entry::{DRIVER_OBJECT, ModuleSlot, NTSTATUS, UNICODE_STRING};

            // Not given a name, for the tag's expression would see that instead of the driver's own.
            const _: $crate::PoolTag = $tag;

            #[cfg(windows)]
            #[global_allocator]
            static ALLOCATOR: $crate::allocator::KernelAllocator =
                $crate::allocator::KernelAllocator::new($tag);

            #[cfg(windows)]
            #[used]
            #[unsafe(link_section = ".drectve")]
            static DIRECTIVES: [u8; $crate::entry::DIRECTIVES.len()] = $crate::entry::DIRECTIVES;

            static MODULE: ModuleSlot<$module> = ModuleSlot::new();

            #[unsafe(no_mangle)]
            #[allow(non_snake_case)]
            unsafe extern "system" fn DriverEntry(
                driver: *mut DRIVER_OBJECT,
                registry_path: *mut UNICODE_STRING,
            ) -> NTSTATUS {
                // SAFETY: the kernel calls this, once.
                unsafe { MODULE.start(driver, registry_path, driver_unload) }
            }

            #[unsafe(no_mangle)]
            unsafe extern "system" fn driver_entry(
                driver: *mut DRIVER_OBJECT,
                registry_path: *mut UNICODE_STRING,
            ) -> NTSTATUS {
                // SAFETY: the same function under another name.
                unsafe { DriverEntry(driver, registry_path) }
            }

            unsafe extern "system" fn driver_unload(driver: *mut DRIVER_OBJECT) {
                // SAFETY: the kernel calls this, once, and only if the start succeeded.
                unsafe { MODULE.stop(driver) }
            }
        };
    };
}
