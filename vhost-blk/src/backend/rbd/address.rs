//! Where an RBD image is, as QEMU writes it: `rbd:POOL/IMAGE[@SNAPSHOT][:OPTION=VALUE]...` (its block/rbd.c). A backslash takes
//! the meaning of the character behind it away.

use std::path::Path;

/// What begins such a name.
const SCHEME: &str = "rbd:";

/// An image of a pool.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Address {
    /// The pool.
    pub pool: String,
    /// The namespace in the pool, or none.
    pub namespace: String,
    /// The image.
    pub image: String,
    /// The snapshot of it, or none.
    pub snapshot: Option<String>,
    /// The cluster's configuration file, if it is not where it always is.
    pub conf: Option<String>,
    /// Who asks, if that is not `admin`.
    pub id: Option<String>,
    /// Options of Ceph's, in the place of those of the file.
    pub options: Vec<(String, String)>,
}

/// Whether a name is that of an RBD image. A file of that name is `./rbd:...`.
pub fn is_address(path: &Path) -> bool {
    path.as_os_str().as_encoded_bytes().starts_with(SCHEME.as_bytes())
}

/// The text up to the first of `ends` that stands for itself, that character, and the rest.
fn until<'a>(text: &'a str, ends: &[char]) -> (String, Option<char>, &'a str) {
    let mut word = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => word.extend(chars.next().map(|(_, c)| c)),
            c if ends.contains(&c) => return (word, Some(c), &text[at + c.len_utf8()..]),
            c => word.push(c),
        }
    }
    (word, None, "")
}

impl Address {
    /// Of a name; why it is none.
    pub fn of(path: &Path) -> Result<Address, String> {
        let text = path.to_str().ok_or("an RBD image whose name is not UTF-8")?;
        let form = || format!("'{text}': write rbd:POOL/IMAGE[@SNAPSHOT][:OPTION=VALUE]...");
        let text = text.strip_prefix(SCHEME).ok_or_else(form)?;
        let (pool, end, rest) = until(text, &['/']);
        end.ok_or_else(form)?;
        let mut address = Address { pool, ..Address::default() };
        let (mut image, mut end, mut rest) = until(rest, &['/', '@', ':']);
        if end == Some('/') {
            address.namespace = std::mem::take(&mut image);
            (image, end, rest) = until(rest, &['@', ':']);
        }
        address.image = image;
        if end == Some('@') {
            let (snapshot, after, more) = until(rest, &[':']);
            address.snapshot = Some(snapshot);
            (end, rest) = (after, more);
        }
        while end.is_some() {
            let (key, equals, value) = until(rest, &['=', ':']);
            if equals != Some('=') {
                return Err(form());
            }
            let (value, after, more) = until(value, &[':']);
            match key.as_str() {
                "" => return Err(form()),
                "conf" => address.conf = Some(value),
                "id" => address.id = Some(value),
                _ => address.options.push((key, value)),
            }
            (end, rest) = (after, more);
        }
        if address.pool.is_empty() || address.image.is_empty() || address.snapshot.as_deref() == Some("") {
            return Err(form());
        }
        Ok(address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Result<Address, String> {
        Address::of(Path::new(text))
    }

    #[test]
    fn names_are_those_of_qemu() {
        let plain = of("rbd:pool/image").unwrap();
        assert_eq!((plain.pool.as_str(), plain.image.as_str(), plain.snapshot), ("pool", "image", None));
        let all = of(r"rbd:p/n/i@s:id=me:conf=/etc/a\:b.conf:rados_osd_op_timeout=30").unwrap();
        let wanted = Address {
            pool: "p".into(),
            namespace: "n".into(),
            image: "i".into(),
            snapshot: Some("s".into()),
            conf: Some("/etc/a:b.conf".into()),
            id: Some("me".into()),
            options: vec![("rados_osd_op_timeout".into(), "30".into())],
        };
        assert_eq!(all, wanted);
        assert_eq!(of(r"rbd:p\/q/i\@1").unwrap().pool, "p/q");
        for bad in [
            "rbd:",
            "rbd:pool",
            "rbd:/i",
            "rbd:p/",
            "rbd:p/i@",
            "rbd:p/i:",
            "rbd:p/i:x",
            "rbd:p/i:=1",
            "disk",
        ] {
            assert!(of(bad).is_err(), "{bad}");
        }
        assert!(is_address(Path::new("rbd:p/i")) && !is_address(Path::new("./rbd:p/i")));
    }
}
