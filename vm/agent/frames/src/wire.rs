use alloc::string::String;
use alloc::vec::Vec;

/// Why bytes are not the message they should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed(pub &'static str);

/// What is left of a body.
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn array<const N: usize>(&mut self) -> Result<&'a [u8; N], Malformed> {
        let (head, rest) = self
            .rest
            .split_first_chunk()
            .ok_or(Malformed("the message ends within a field"))?;
        self.rest = rest;
        Ok(head)
    }

    fn counted(&mut self) -> Result<&'a [u8], Malformed> {
        let length = u32::read(self)? as usize;
        let (head, rest) = self
            .rest
            .split_at_checked(length)
            .ok_or(Malformed("the message ends within a field"))?;
        self.rest = rest;
        Ok(head)
    }
}

/// A value with a place in messages.
pub trait Wire<'a>: Sized {
    /// Takes the value off the reader.
    fn read(reader: &mut Reader<'a>) -> Result<Self, Malformed>;
    /// Appends the value to `out`.
    fn write(&self, out: &mut Vec<u8>);
}

/// Reads a message that is all of `body`.
pub fn from_bytes<'a, T: Wire<'a>>(body: &'a [u8]) -> Result<T, Malformed> {
    let mut reader = Reader { rest: body };
    let value = T::read(&mut reader)?;
    if reader.rest.is_empty() {
        Ok(value)
    } else {
        Err(Malformed("bytes behind the message"))
    }
}

/// The body that a message makes.
pub fn to_bytes<'a, T: Wire<'a>>(value: &T) -> Vec<u8> {
    let mut out = Vec::new();
    value.write(&mut out);
    out
}

fn write_counted(bytes: &[u8], out: &mut Vec<u8>) {
    (bytes.len() as u32).write(out);
    out.extend_from_slice(bytes);
}

impl<'a> Wire<'a> for u32 {
    fn read(reader: &mut Reader<'a>) -> Result<Self, Malformed> {
        Ok(u32::from_le_bytes(*reader.array()?))
    }
    fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.to_le_bytes());
    }
}

impl<'a> Wire<'a> for u64 {
    fn read(reader: &mut Reader<'a>) -> Result<Self, Malformed> {
        Ok(u64::from_le_bytes(*reader.array()?))
    }
    fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.to_le_bytes());
    }
}

impl<'a> Wire<'a> for bool {
    fn read(reader: &mut Reader<'a>) -> Result<Self, Malformed> {
        match reader.array()? {
            [0] => Ok(false),
            [1] => Ok(true),
            _ => Err(Malformed("a bool that is neither 0 nor 1")),
        }
    }
    fn write(&self, out: &mut Vec<u8>) {
        out.push(u8::from(*self));
    }
}

impl<'a> Wire<'a> for &'a [u8] {
    fn read(reader: &mut Reader<'a>) -> Result<Self, Malformed> {
        reader.counted()
    }
    fn write(&self, out: &mut Vec<u8>) {
        write_counted(self, out);
    }
}

impl<'a> Wire<'a> for &'a str {
    fn read(reader: &mut Reader<'a>) -> Result<Self, Malformed> {
        core::str::from_utf8(reader.counted()?).map_err(|_| Malformed("a string that is not UTF-8"))
    }
    fn write(&self, out: &mut Vec<u8>) {
        write_counted(self.as_bytes(), out);
    }
}

impl<'a> Wire<'a> for String {
    fn read(reader: &mut Reader<'a>) -> Result<Self, Malformed> {
        <&str>::read(reader).map(String::from)
    }
    fn write(&self, out: &mut Vec<u8>) {
        self.as_str().write(out);
    }
}

impl<'a, T: Wire<'a>> Wire<'a> for Option<T> {
    fn read(reader: &mut Reader<'a>) -> Result<Self, Malformed> {
        bool::read(reader)?.then(|| T::read(reader)).transpose()
    }
    fn write(&self, out: &mut Vec<u8>) {
        self.is_some().write(out);
        if let Some(value) = self {
            value.write(out);
        }
    }
}

impl<'a, T: Wire<'a>> Wire<'a> for Vec<T> {
    fn read(reader: &mut Reader<'a>) -> Result<Self, Malformed> {
        // The count is the peer's word: nothing is reserved on its account.
        let count = u32::read(reader)?;
        (0..count).map(|_| T::read(reader)).collect()
    }
    fn write(&self, out: &mut Vec<u8>) {
        (self.len() as u32).write(out);
        for item in self {
            item.write(out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    #[test]
    fn values_come_back() {
        let list: Vec<Option<String>> = vec![None, Some(String::from("ü"))];
        assert_eq!(from_bytes(&to_bytes(&list)), Ok(list));
        assert_eq!(from_bytes(&to_bytes(&u64::MAX)), Ok(u64::MAX));
        assert_eq!(
            from_bytes::<&[u8]>(&to_bytes(&&b"\0\xFF"[..])),
            Ok(&b"\0\xFF"[..])
        );
    }

    #[test]
    fn what_is_malformed_is_refused() {
        assert!(from_bytes::<bool>(&[2]).is_err());
        assert!(from_bytes::<u32>(&[0; 3]).is_err());
        assert!(from_bytes::<u32>(&[0; 5]).is_err());
        assert!(from_bytes::<&str>(&[1, 0, 0, 0, 0xFF]).is_err());
        assert!(from_bytes::<&[u8]>(&[2, 0, 0, 0, 0]).is_err());
        assert!(from_bytes::<Vec<u32>>(&[0xFF; 8]).is_err());
    }
}
