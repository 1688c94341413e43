//! The codes of device controls.

/// A control code, as `CTL_CODE` makes it and `DeviceIoControl` takes it.
///
/// ```
/// use kernel_device::{Access, ControlCode, Method};
///
/// const ECHO: ControlCode = ControlCode::new(0x22, 0x800, Method::Buffered, Access::Any);
/// assert_eq!(ECHO.to_raw(), 0x0022_2000);
/// ```
///
/// A function above 12 bits does not compile, in a constant:
///
/// ```compile_fail,E0080
/// # use kernel_device::{Access, ControlCode, Method};
/// const WRONG: ControlCode = ControlCode::new(0x22, 0x1000, Method::Buffered, Access::Any);
/// # assert_eq!(WRONG.to_raw(), 0);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ControlCode(u32);

/// How a control's data travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Method {
    /// Copied by the kernel, in and out. The only one that a device of the framework's sees.
    Buffered = 0,
    /// The output buffer is locked, and read by the driver.
    InDirect = 1,
    /// The output buffer is locked, and written by the driver.
    OutDirect = 2,
    /// The driver gets the program's own addresses.
    Neither = 3,
}

/// The rights that a handle must have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// None.
    Any = 0,
    /// To read.
    Read = 1,
    /// To write.
    Write = 2,
    /// To read and to write.
    ReadWrite = 3,
}

const MOST_FUNCTION: u16 = 0xFFF;

impl ControlCode {
    /// The code of a function, 12 bits, of a device type. Microsoft keeps the functions below
    /// 0x800 and the types below 0x8000 for itself.
    ///
    /// # Panics
    ///
    /// If the function has more than 12 bits; in a constant that is a compile error.
    #[must_use]
    pub const fn new(device_type: u16, function: u16, method: Method, access: Access) -> Self {
        assert!(function <= MOST_FUNCTION, "a function has 12 bits");
        Self(
            (device_type as u32) << 16
                | (access as u32) << 14
                | (function as u32) << 2
                | method as u32,
        )
    }

    /// The code that a request carries.
    #[must_use]
    pub const fn from_raw(code: u32) -> Self {
        Self(code)
    }

    /// The code as a number.
    #[must_use]
    pub const fn to_raw(self) -> u32 {
        self.0
    }

    /// How its data travel.
    #[must_use]
    pub const fn method(self) -> Method {
        match self.0 & 3 {
            0 => Method::Buffered,
            1 => Method::InDirect,
            2 => Method::OutDirect,
            _ => Method::Neither,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_those_of_windows() {
        let get_reparse_point = ControlCode::new(9, 42, Method::Buffered, Access::Any);
        assert_eq!(get_reparse_point.to_raw(), 0x0009_00A8);
        let get_length = ControlCode::new(7, 0x17, Method::Buffered, Access::Read);
        assert_eq!(get_length.to_raw(), 0x0007_405C);
        let highest = ControlCode::new(0xFFFF, 0xFFF, Method::Neither, Access::ReadWrite);
        assert_eq!(highest.to_raw(), u32::MAX);
    }

    #[test]
    fn the_method_is_read_back() {
        for method in [
            Method::Buffered,
            Method::InDirect,
            Method::OutDirect,
            Method::Neither,
        ] {
            let code = ControlCode::new(0x22, 0x800, method, Access::ReadWrite);
            assert_eq!(ControlCode::from_raw(code.to_raw()).method(), method);
        }
    }
}
