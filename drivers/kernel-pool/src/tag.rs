//! The four letters by which the kernel tells whose memory a block is.

/// A pool tag: four printable ASCII characters.
///
/// A bad tag in a constant does not compile, a zero one no more than a foreign letter:
///
/// ```
/// const TAG: kernel_pool::PoolTag = kernel_pool::PoolTag::new(*b"hell");
/// ```
/// ```compile_fail
/// const TAG: kernel_pool::PoolTag = kernel_pool::PoolTag::new([0; 4]);
/// ```
/// ```compile_fail
/// const TAG: kernel_pool::PoolTag = kernel_pool::PoolTag::new(*b"h\xe9ll");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolTag([u8; 4]);

impl PoolTag {
    /// The tag of these letters.
    ///
    /// # Panics
    ///
    /// If a letter is not printable ASCII (0x20 to 0x7E); in a constant that is a compile error.
    #[must_use]
    pub const fn new(letters: [u8; 4]) -> Self {
        match Self::try_new(letters) {
            Some(tag) => tag,
            None => panic!("a pool tag is four printable ASCII characters"),
        }
    }

    /// The tag of these letters, if each is printable ASCII.
    #[must_use]
    pub const fn try_new(letters: [u8; 4]) -> Option<Self> {
        let mut index = 0;
        while index < letters.len() {
            if !is_printable(letters[index]) {
                return None;
            }
            index += 1;
        }
        Some(Self(letters))
    }

    /// The first four letters of a package's name; a shorter name is filled up with spaces.
    ///
    /// # Panics
    ///
    /// If one of them is not printable ASCII; in a constant that is a compile error.
    #[must_use]
    pub const fn of_package(name: &str) -> Self {
        let name = name.as_bytes();
        let mut letters = [b' '; 4];
        let mut index = 0;
        while index < letters.len() && index < name.len() {
            letters[index] = name[index];
            index += 1;
        }
        Self::new(letters)
    }

    /// The number that the kernel's functions take: the first letter in the lowest byte.
    #[must_use]
    pub const fn to_ulong(self) -> u32 {
        u32::from_le_bytes(self.0)
    }
}

const fn is_printable(letter: u8) -> bool {
    matches!(letter, b' '..=b'~')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_stand_in_the_order_of_memory() {
        assert_eq!(PoolTag::new(*b"rust").to_ulong(), 0x7473_7572);
    }

    #[test]
    fn a_package_lends_its_first_four_letters() {
        assert_eq!(PoolTag::of_package("hello"), PoolTag::new(*b"hell"));
        assert_eq!(PoolTag::of_package("leak"), PoolTag::new(*b"leak"));
        assert_eq!(PoolTag::of_package("ab"), PoolTag::new(*b"ab  "));
    }

    #[test]
    fn only_printable_ascii_is_a_tag() {
        assert!(PoolTag::try_new(*b" ~Aa").is_some());
        for letters in [[0; 4], *b"abc\0", *b"ab\x7Fc", *b"\x1Fabc", *b"ab\xC3\xA9"] {
            assert_eq!(PoolTag::try_new(letters), None);
        }
    }

    #[test]
    #[should_panic(expected = "four printable ASCII characters")]
    fn a_name_in_another_script_needs_a_tag_of_its_own() {
        let _ = PoolTag::of_package("étude");
    }
}
