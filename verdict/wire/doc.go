// Package wire writes verdicts as the bytes that the control plane sends to an agent, and reads them again.
//
//	verdict.Verdicts ──Message──► mantletv1.Verdicts ──xDS──► bytes ──Unmarshal──► verdict.Verdicts
//	verdict.Packets ──PacketsMessage──► mantletv1.Packets ──xDS──► bytes ──UnmarshalPackets──► verdict.Packets
//
// Each value is written in one way only, and Unmarshal takes nothing else: what it returned would come out as the very message
// that came in. An agent that understood half of a policy would enforce another one.
package wire
