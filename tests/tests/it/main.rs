//! The one integration binary: the rules that a program can check, and real clients against the real server.

mod tidy;
