-- Requests for wrk: each posts the next line of a file, so that no two texts in flight are equal.
--   wrk -s benchmarks/wrk_texts.lua URL -- BODIES   (a body of JSON on each line)

local bodies, at = {}, 0

function init(args)
  for line in io.lines(args[1]) do
    bodies[#bodies + 1] = line
  end
  wrk.method = "POST"
  wrk.headers["Content-Type"] = "application/json"
end

function request()
  at = at % #bodies + 1
  return wrk.format(nil, nil, nil, bodies[at])
end

function done(summary, latency)
  local errors = summary.errors
  local broken = errors.connect + errors.read + errors.write + errors.timeout
  io.write(string.format("result %d %.6f %d %d %.3f %.3f %.3f\n", summary.requests,
    summary.duration / 1e6, errors.status, broken, latency:percentile(50) / 1e3,
    latency:percentile(99) / 1e3, latency.max / 1e3))
end
