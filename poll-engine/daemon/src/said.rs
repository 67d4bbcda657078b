//! What people write, as serde's data: lists of `KEY=VALUE` on a command line and tables in a file become the same types,
//! by the same parsers of values.

use std::fmt::{self, Display};
use std::marker::PhantomData;

use poll_engine::engine::placement::CpuList;
use poll_engine::engine::placement::auto::Cpus;
use serde::de::value::{Error, MapAccessDeserializer, SeqDeserializer, StrDeserializer};
use serde::de::{
    DeserializeOwned, DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Unexpected, Visitor,
};
use serde::{Deserialize, forward_to_deserialize_any};

/// A value as a command line has it. In a file numbers, truth values and lists of them need no quotes.
struct Text(String);

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Text, D::Error> {
        struct AsText;
        impl<'de> Visitor<'de> for AsText {
            type Value = Text;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text, a number, true or false, or a list")
            }

            fn visit_str<E>(self, s: &str) -> Result<Text, E> {
                Ok(Text(s.into()))
            }

            fn visit_i64<E>(self, n: i64) -> Result<Text, E> {
                Ok(Text(n.to_string()))
            }

            fn visit_u64<E>(self, n: u64) -> Result<Text, E> {
                Ok(Text(n.to_string()))
            }

            fn visit_f64<E>(self, n: f64) -> Result<Text, E> {
                Ok(Text(n.to_string()))
            }

            fn visit_bool<E>(self, on: bool) -> Result<Text, E> {
                Ok(Text(if on { "on" } else { "off" }.into()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Text, A::Error> {
                let mut all = Vec::new();
                while let Some(Text(item)) = items.next_element()? {
                    all.push(item);
                }
                Ok(Text(all.join("+")))
            }
        }
        from.deserialize_any(AsText)
    }
}

/// A field's value, parsed as on a command line; of a list, its items with `+` between them.
pub fn parsed<'de, D: Deserializer<'de>, T, E: Display>(
    from: D,
    parse: impl FnOnce(&str) -> Result<T, E>,
) -> Result<T, D::Error> {
    let Text(text) = Text::deserialize(from)?;
    parse(&text).map_err(D::Error::custom)
}

/// Makes functions for `#[serde(deserialize_with)]`, each of a parser of text.
#[macro_export]
macro_rules! from_text {
    ($($name:ident: $type:ty = $parse:expr;)*) => {$(
        fn $name<'de, D: serde::Deserializer<'de>>(from: D) -> Result<$type, D::Error> {
            $crate::said::parsed(from, $parse)
        }
    )*};
}

/// A list of tables, of which one needs no list. Where `may_be_on`, it may be true instead, for one without any keys, or false,
/// for none.
pub fn several<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(
    from: D,
    may_be_on: bool,
) -> Result<Vec<T>, D::Error> {
    struct Several<T>(bool, PhantomData<T>);
    impl<'de, T: Default + Deserialize<'de>> Visitor<'de> for Several<T> {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(if self.0 {
                "true, false, a table, or a list of tables"
            } else {
                "a table, or a list of tables"
            })
        }

        fn visit_bool<E: serde::de::Error>(self, on: bool) -> Result<Vec<T>, E> {
            match (self.0, on) {
                (false, _) => Err(E::invalid_type(Unexpected::Bool(on), &self)),
                (true, true) => Ok(vec![T::default()]),
                (true, false) => Ok(Vec::new()),
            }
        }

        fn visit_map<A: MapAccess<'de>>(self, table: A) -> Result<Vec<T>, A::Error> {
            Ok(vec![T::deserialize(MapAccessDeserializer::new(table))?])
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Vec<T>, A::Error> {
            std::iter::from_fn(|| items.next_element().transpose()).collect()
        }
    }
    from.deserialize_any(Several(may_be_on, PhantomData))
}

/// A list of CPUs; in a file its parts may be the items of a list.
pub fn cpu_list(s: &str) -> Result<CpuList, String> {
    s.replace('+', ",").parse()
}

/// The same, or that they are to be chosen.
pub fn cpus(s: &str) -> Result<Cpus, String> {
    s.replace('+', ",").parse()
}

/// On or off.
pub fn switch(s: &str) -> Result<crate::Switch, String> {
    clap::ValueEnum::from_str(s, false)
}

/// A list such as `name=a,mtu=9000,wait`; a key without a value is on, one that is there again has a list.
pub fn from_keys<T: DeserializeOwned>(list: &str) -> Result<T, String> {
    let mut pairs: Vec<(&str, Vec<&str>)> = Vec::new();
    for pair in list.split(',') {
        let (key, value) = pair.split_once('=').unwrap_or((pair, "on"));
        match pairs.iter_mut().find(|(known, _)| *known == key) {
            Some((_, values)) => values.push(value),
            None => pairs.push((key, vec![value])),
        }
    }
    T::deserialize(Keys { pairs: pairs.into_iter(), next: None }).map_err(|e| e.to_string())
}

/// The list, a pair after the other.
struct Keys<'a> {
    pairs: std::vec::IntoIter<(&'a str, Vec<&'a str>)>,
    next: Option<(&'a str, Vec<&'a str>)>,
}

impl<'de> Deserializer<'de> for Keys<'_> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_map(self)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf option unit unit_struct newtype_struct
        seq tuple tuple_struct map struct enum identifier ignored_any
    }
}

impl<'de> MapAccess<'de> for Keys<'_> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Error> {
        self.next = self.pairs.next();
        let key = self.next.as_ref().map(|(key, _)| StrDeserializer::new(key));
        key.map(|key| seed.deserialize(key)).transpose()
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, Error> {
        let (key, values) = self.next.take().unwrap_or_default();
        seed.deserialize(Value(values)).map_err(|e| Error::custom(format!("{key}: {e}")))
    }
}

struct Value<'a>(Vec<&'a str>);

impl<'de> Deserializer<'de> for Value<'_> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.0.as_slice() {
            [one] => visitor.visit_str(one),
            _ => visitor.visit_seq(SeqDeserializer::new(self.0.into_iter())),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_some(self)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf unit unit_struct newtype_struct
        seq tuple tuple_struct map struct enum identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
    struct Pet {
        name: Option<String>,
        #[serde(deserialize_with = "legs")]
        legs: u8,
        #[serde(deserialize_with = "tame")]
        tame: bool,
        #[serde(deserialize_with = "eats")]
        eats: Vec<String>,
    }

    crate::from_text! {
        legs: u8 = str::parse;
        tame: bool = crate::on_off;
        eats: Vec<String> = |s| Ok::<_, String>(s.split('+').map(str::to_owned).collect());
    }

    #[test]
    fn a_list_and_a_table_say_the_same() {
        let pet = Pet { name: Some("a".into()), legs: 4, tame: true, eats: vec!["x".into(), "7".into()] };
        for list in ["name=a,legs=4,tame,eats=x,eats=7", "eats=x+7,tame=on,legs=4,name=a"] {
            assert_eq!(from_keys::<Pet>(list).as_ref(), Ok(&pet), "{list}");
        }
        for table in [
            "name = 'a'\nlegs = 4\ntame = true\neats = ['x', 7]",
            "name = 'a'\nlegs = '4'\ntame = 'on'\neats = 'x+7'",
        ] {
            assert_eq!(toml::from_str::<Pet>(table).as_ref(), Ok(&pet), "{table}");
        }
    }

    #[test]
    fn one_table_needs_no_list() {
        #[derive(Debug, Default, Deserialize)]
        #[serde(default)]
        struct Zoo {
            #[serde(deserialize_with = "pets")]
            pet: Vec<Pet>,
            #[serde(deserialize_with = "tables")]
            wild: Vec<Pet>,
        }
        fn pets<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Pet>, D::Error> {
            several(from, true)
        }
        fn tables<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Pet>, D::Error> {
            several(from, false)
        }
        let legs = |text| toml::from_str::<Zoo>(text).map(|zoo| zoo.pet.iter().map(|pet| pet.legs).collect());
        for (text, pets) in [
            ("", vec![]),
            ("pet = false", vec![]),
            ("pet = true", vec![0]),
            ("[pet]\nlegs = 4", vec![4]),
            ("[[pet]]\nlegs = 4\n[[pet]]\nlegs = 2", vec![4, 2]),
        ] {
            assert_eq!(legs(text), Ok(pets), "{text}");
        }
        for text in [
            "pet = 4",
            "pet = [true]",
            "wild = true",
            "wild = 'on'",
            "[[pet]]\nwings = 2",
            "[wild]\nlegs = 'x'",
        ] {
            assert!(legs(text).is_err(), "{text}");
        }
        assert_eq!(toml::from_str::<Zoo>("[wild]\nlegs = 4").unwrap().wild.len(), 1);
    }

    #[test]
    fn what_is_wrong_is_said_with_its_key() {
        for (list, said) in [
            ("legs=x", "legs: invalid digit"),
            ("legs=1,legs=2", "legs: invalid digit"),
            ("tame=yes", "tame: 'yes' is neither on nor off"),
            ("name=a,name=b", "name: invalid type: sequence"),
            ("wings=2", "unknown field `wings`, expected one of `name`"),
            ("", "unknown field ``"),
        ] {
            let e = from_keys::<Pet>(list).unwrap_err();
            assert!(e.starts_with(said), "{list}: {e}");
        }
    }
}
