// Package matcher interprets emitted Envoy configuration: it says which filter chain a listener chooses for a connection, and what a
// network RBAC filter rules, the way the real Envoy would, so that thousands of random policies can be checked without one.
//
//	Listener, RBAC (protobuf) ──► CheckListener, CheckRBAC   would Envoy take it, and is all of it known here?
//	        │
//	        └─ Connection ──► FilterChain, RBAC ──► Evaluate ──► input, predicate, tree
//
// An input, matcher or action that the interpreter does not know is an error and never a guess. The tests send every fact below, and
// random matchers, through the real Envoy and want the same answer.
//
// # What Envoy 1.40.0 does, measured
//
// A nested matcher that finds nothing is as if the entry that led to it were not there:
//   - exact map: the map's own on_no_match; without one, the same one level up, and so on to the top;
//   - IP trie: the next shorter prefix that holds the address (of equal ones the next written), then on_no_match. An entry marked
//     exclusive counts only if it is the longest; it does not stop shorter ones from being tried after it;
//   - prefix map: the next shorter prefix, then on_no_match;
//   - list: the next entry whose predicate holds, then on_no_match;
//   - a nested on_no_match comes before the outer one, and a nested miss inside on_no_match is the end.
//
// Nothing found at the top is the default filter chain, or a closed connection where there is none; in RBAC it denies.
//
// An input is one of three: a text; none; not available. None (filter state that is not set or no SNI, no ALPN, a certificate without
// URI SAN) matches no pattern, not even ".*", so that "not" of it holds; in a tree it goes to on_no_match. Not available (UriSanInput
// on anything but a completed TLS handshake, hence always in filter_chain_matcher) gives up the whole match: no on_no_match, inner or
// outer, is taken, and the default filter chain or a denial follows. Only "or" goes past it, and "and" may stop before it.
//
// Values: ports in decimal; ALPN as 'mantlet','h2' with the quotes; several URI SANs as one text with commas; the transport protocol is
// raw_buffer where none was detected. A regular expression has to match the whole text. An IPv6 range, ::/0 too, never holds an IPv4
// address. An IP trie reads any text input; what is no address goes to on_no_match.
//
// Traps: keep_matching is refused in RBAC, but in filter_chain_matcher it is accepted and the first connection crashes Envoy. An action
// may name a filter chain that is not there: accepted, and the connection is closed. RBAC takes no TransportProtocolInput and no
// ApplicationProtocolInput.
package matcher
