-- The twin of SlidingWindow. State: used, then slot, count, slot, count...
function definitions.s()
  local A = {}

  function A.new() return {0} end

  local function width(c) return ceil(c[4] / SLOTS) end

  local function forgotten_at(c, slot) return (slot + 1) * width(c) + c[4] end

  local function slide(s, c)
    local n = #s
    if n > 1 then catch_up(s[n - 1] * width(c)) end
    local slot = floor(now / width(c))
    if n > 1 and s[n - 1] > slot then
      local ahead = s[n - 1] - slot
      for i = 2, n, 2 do s[i] = s[i] - ahead end
      s.moved = true
    end
    while #s > 1 and forgotten_at(c, s[2]) <= now do
      s.moved = true
      s[1] = s[1] - s[3]
      table.remove(s, 2)
      table.remove(s, 2)
    end
    return slot
  end

  function A.room(s, c)
    slide(s, c)
    return c[3] - s[1]
  end

  function A.take(s, c, hits)
    local slot = slide(s, c)
    if hits > 0 then
      local n = #s
      if n > 1 and s[n - 1] == slot then
        s[n] = s[n] + hits
      else
        s[n + 1] = slot
        s[n + 2] = hits
      end
      s[1] = s[1] + hits
    end
    return slot
  end

  function A.give_back(s, c, hits, mark)
    slide(s, c)
    for i = 2, #s, 2 do
      if s[i] == mark then
        local undone = min(hits, s[i + 1])
        s[i + 1] = s[i + 1] - undone
        s[1] = s[1] - undone
      end
    end
  end

  function A.wait(s, c, hits)
    if hits > c[3] then return nil end
    local missing = hits - A.room(s, c)
    if missing <= 0 then return 0 end
    for i = 2, #s, 2 do
      missing = missing - s[i + 1]
      if missing <= 0 then return forgotten_at(c, s[i]) - now end
    end
    return c[4]
  end

  function A.reset(s, c)
    slide(s, c)
    if s[1] == 0 then return 0 end
    return forgotten_at(c, s[#s - 1]) - now
  end

  function A.lease_us(_, c)
    local w = width(c)
    return (floor(now / w) + 1) * w - now
  end

  function A.keep_us(_, c) return c[4] + width(c) end

  return A
end
