package hold

import (
	"net"
	"testing"
	"time"
)

// BenchmarkConnectKnown measures connections to an allowed destination with the table and, in turn, with its chain unhooked: the ratio is
// of one run.
func BenchmarkConnectKnown(b *testing.B) {
	connect(b)
	const address = "10.99.0.1:81"
	once := func() time.Duration {
		at := time.Now()
		c, err := net.Dial("tcp", address)
		if err != nil {
			b.Fatal(err)
		}
		took := time.Since(at)
		_ = c.(*net.TCPConn).SetLinger(0)
		_ = c.Close()
		return took
	}
	h := open(b, config(), asker(oddPorts))
	start(b, h)
	first := once()
	var with, without time.Duration
	var n int
	for b.Loop() {
		for range 50 {
			with += once()
		}
		dormant(b, 1)
		for range 50 {
			without += once()
		}
		dormant(b, 0)
		n += 50
	}
	b.ReportMetric(float64(with.Microseconds())/float64(n), "µs/with")
	b.ReportMetric(float64(without.Microseconds())/float64(n), "µs/without")
	b.ReportMetric(float64(with)/float64(without), "ratio")
	b.ReportMetric(float64(first.Microseconds()), "µs/first")
}
